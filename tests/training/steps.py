"""Helpers that train steps of an engine and read its whole state."""

from __future__ import annotations

import numpy as np
from torch.distributed.tensor import DTensor

from distrec.training.engine import Engine


def train_steps(engine: Engine, first: int, stop: int) -> None:
    engine.set_lr(1e-2)
    for step in range(first, stop):
        engine.train_step(0, step, engine.samples(0, step))


def full(engine: Engine) -> dict[str, np.ndarray]:
    """Every tensor of the engine's state, as a whole array. Collective."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).numpy().copy()
        for name, value in engine.state().items()
    }
