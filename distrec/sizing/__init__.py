"""What a run needs before it runs: memory of each worker, checkpoints, exchanged bytes, time (`distrec plan`)."""

from distrec.sizing.plan import worker_bytes

__all__ = ["worker_bytes"]
