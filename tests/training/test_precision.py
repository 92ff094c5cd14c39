"""Training in bfloat16: losses are close to those in float32, decrease, and continue at another number of workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distrec.errors import InputError
from distrec.methods.registry import resolve
from distrec.runtime import quiet
from tests.distributed import run_workers
from tests.methods.configs import run
from tests.training.towered import build, place, weights, write_data

STEPS, MORE = 5, 3
CASES = (("adamw", 1), ("sgd", 1), ("adamw", 2), ("adamw", 3))  # optimizer and ZeRO stage
Losses = list[float]


def made(folder: str, rule: str, precision: str, stage: int, **train: Any) -> Any:
    optimizer = {"name": rule, "lr": 2e-2 if rule == "adamw" else 0.5, "clip_norm": 0.05}
    return build(folder, optimizer=optimizer, dense={"precision": precision, "zero_stage": stage}, train=train)


def losses(engine: Any, first: int, count: int) -> Losses:
    out = []
    for number in range(first, first + count):
        epoch, step = place(engine, number)
        out.append(sum(engine.train_step(epoch, step, engine.samples(epoch, step))[0].values()))
    return out


def whole(engine: Any) -> dict[str, torch.Tensor]:
    state = engine.state().items()
    return {name: (value.full_tensor() if name.startswith("table.") else value).clone() for name, value in state}


def load(engine: Any, state: dict[str, torch.Tensor], steps: int) -> None:
    for name, value in engine.state().items():
        if name.startswith("table."):
            mine = engine.tables.partition(name.split(".")[1])
            value.to_local().copy_(state[name][mine.start(engine.world.rank) : mine.stop(engine.world.rank)])
    engine.load_dense(state, steps)


def trained(folder: str, carried: list[dict[str, torch.Tensor]]) -> list[tuple[dict[str, torch.Tensor], Losses]]:
    """By case, the state after some steps and the losses of further steps.

    The state is trained here if `carried` is empty, and otherwise loaded from it.
    """
    quiet()
    out = []
    for rule, stage in CASES:
        engine, where = made(folder, rule, "bf16", stage), f"{rule}, ZeRO {stage}"
        assert {weight.dtype for weight in engine.dense._engine.module.parameters()} == {torch.bfloat16}
        if carried:
            load(engine, carried[len(out)], STEPS)
            back = whole(engine)
            assert all(torch.equal(back[name], value) for name, value in carried[len(out)].items()), where
            assert engine.dense.steps == (STEPS if rule == "adamw" else 0)
        else:
            exact = made(folder, rule, "fp32", stage)
            initial = weights(exact)
            assert all(torch.equal(value, initial[name]) for name, value in weights(engine).items()), "rounded weights"
            wanted, found = losses(exact, 0, STEPS), losses(engine, 0, STEPS)
            assert found == pytest.approx(wanted, rel=2e-2), where
            assert found != wanted, "bfloat16 has no effect"
            pieces = made(folder, rule, "bf16", stage, accumulate=3)
            assert losses(pieces, 0, STEPS) == pytest.approx(wanted, rel=2e-2), where
        state = whole(engine)
        assert all(value.dtype == torch.float32 for value in state.values())
        out.append((state, losses(engine, STEPS, MORE)))
    return out


def decreasing(folder: str) -> None:
    quiet()
    for stage in (1, 2, 3):
        engine = made(folder, "adamw", "bf16", stage)
        seen = losses(engine, 0, 20 * engine.steps_per_epoch)
        full = [loss for number, loss in enumerate(seen) if (number + 1) % engine.steps_per_epoch]
        assert sum(full[-10:]) < 0.8 * sum(full[:10]), f"ZeRO {stage}"


@pytest.mark.multiprocess
def test_bfloat16_is_close_to_float32_and_continues_at_another_number_of_workers(tmp_path: Path):
    folder = write_data(tmp_path / "data")
    two = run_workers(trained, 2, folder, [], timeout=300)[0]
    for size in (3, 1):
        found = run_workers(trained, size, folder, [state for state, _ in two], timeout=300)[0]
        for (_, wanted), (_, more) in zip(two, found, strict=True):
            assert more == pytest.approx(wanted, rel=1e-2)


def test_training_in_bfloat16_decreases_the_loss(tmp_path: Path):
    run_workers(decreasing, 1, write_data(tmp_path / "data"), timeout=300)


def test_bfloat16_is_refused_without_zero():
    with pytest.raises(InputError, match=r"key 'dense.zero_stage' is 0 but 'dense.precision: bf16' needs 1, 2 or 3"):
        resolve(run({"name": "alignrec"}, dense={"precision": "bf16"}))
    assert resolve(run({"name": "alignrec"}, dense={"precision": "bf16", "zero_stage": 1})).dense.precision == "bf16"
