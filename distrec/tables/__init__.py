"""ID and feature tables on TorchRec: specification, plan, initial values, optimizers, state."""
