"""Clipping by the joint norm of tables and dense weights, against plain PyTorch in one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from distrec.errors import InputError, NonFiniteLoss
from distrec.methods.registry import resolve
from distrec.parallel.world import World
from distrec.runtime import quiet
from tests.distributed import run_workers
from tests.methods.configs import run
from tests.training.towered import STEPS, build, place, plain, weights, write_data

# If gradients nearly cancel, AdamW with a small eps turns their rounding errors into full steps.
ADAMW: dict[str, Any] = {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4}
ACTIVE, IDLE = 0.02, 1e3


def step(engine: Any, number: int) -> None:
    engine.train_step(*place(engine, number), engine.samples(*place(engine, number)))


def trajectories(folder: str) -> None:
    for stage in (0, 1, 2, 3):
        for clip in (ACTIVE, IDLE) if stage == 1 else (ACTIVE,):
            engine = build(folder, optimizer=ADAMW | {"clip_norm": clip}, dense={"zero_stage": stage})
            assert engine.grad_norm is None
            for number, (_, norm, wanted) in enumerate(plain(engine, clip)):
                where = f"step {number}, ZeRO {stage}, clip {clip}, {engine.world.size} workers"
                step(engine, number)
                assert engine.grad_norm == pytest.approx(norm, rel=1e-5), where
                assert (norm > 2 * clip) == (clip == ACTIVE)
                found = weights(engine)
                assert found.keys() == wanted.keys()
                for name, value in wanted.items():
                    difference = float((found[name] - value).abs().max())
                    assert difference <= 1e-6, f"{name}: {difference}, {where}"


def without(folder: str) -> None:
    """Check that clipping changes the trajectory and that no norm is computed without it."""
    engine = build(folder, optimizer=ADAMW)
    *_, (_, _, unclipped) = plain(engine)
    *_, (_, _, clipped) = plain(engine, ACTIVE)
    assert all(float((clipped[name] - unclipped[name]).abs().max()) > 1e-4 for name in clipped)
    step(engine, 0)
    assert engine.grad_norm is None


def not_finite(folder: str, world: World) -> None:
    """If one rank's gradient is infinite, every rank raises an error, and no weight changes."""
    for stage in (0, 1, 2, 3):
        engine = build(folder, optimizer=ADAMW | {"clip_norm": ACTIVE}, dense={"zero_stage": stage})
        before = weights(engine)
        engine.forward_backward(0, 0, engine.samples(0, 0))
        if world.rank == world.size - 1:
            engine.tables.block("user").grad[0, 0] = torch.inf
        with pytest.raises(
            NonFiniteLoss, match="the gradient's norm is inf though the loss is finite; weights were not"
        ):
            engine.update()
        assert all(torch.equal(value, before[name]) for name, value in weights(engine).items())


def broken_backward(loss: Any, batch: Any) -> Any:
    """Loss terms with correct values, whose gradients are NaN."""
    terms = loss(batch)
    for term in terms.values():
        term.register_hook(lambda grad: grad * torch.nan)
    return terms


def skipped(folder: str, world: World) -> None:
    """Without clipping, DeepSpeed skips such a step under ZeRO. Every rank raises an error, and no table changes."""
    for stage in (1, 2, 3):
        for precision in ("fp32", "bf16"):
            engine = build(folder, optimizer=ADAMW, dense={"zero_stage": stage, "precision": precision})
            before = weights(engine)
            if world.rank == 0:
                engine.method.loss = partial(broken_backward, engine.method.loss)
            with pytest.raises(
                NonFiniteLoss, match="the gradient of the dense module is NaN or infinite though the loss"
            ):
                step(engine, 0)
            assert all(torch.equal(value, before[name]) for name, value in weights(engine).items())


def everything(folder: str) -> None:
    quiet()
    trajectories(folder)
    without(folder)
    not_finite(folder, World.current())
    skipped(folder, World.current())


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_stage_clips_the_whole_gradient_as_pytorch_does(size: int, tmp_path: Path):
    run_workers(everything, size, write_data(tmp_path / "data"), timeout=300)


def test_clipping_is_refused_if_tables_are_updated_before_the_norm_is_known():
    optimizer = {"tables": "sparse", "clip_norm": 1.0}
    with pytest.raises(InputError, match=r"key 'optimizer.clip_norm' must be 0 with 'optimizer.tables: sparse'"):
        resolve(run({"name": "bprmf"}, optimizer=optimizer))
    assert resolve(run({"name": "lightgcn"}, optimizer={"clip_norm": 1.0})).optimizer.clip_norm == 1.0
    assert STEPS > 3  # more than an epoch, so that the steps include a short batch
