"""A step over micro-batches equals the undivided step of plain PyTorch in one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from distrec.config import RunConfig
from distrec.config.run import DenseSection, OptimizerSection
from distrec.errors import InputError
from distrec.methods.registry import resolve
from distrec.parallel.world import World
from distrec.runtime import quiet
from tests.distributed import run_workers
from tests.methods.configs import run
from tests.training.towered import build, place, plain, weights, write_data

# If gradients nearly cancel, AdamW with a small eps turns their rounding errors into full steps.
ADAMW: dict[str, Any] = {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4}
CLIP = 0.02
# Number of micro-batches by ZeRO stage; neither divides 50 rows. A micro-batch of the last batch has at most one row,
# so with 3 workers at least two have no rows.
PIECES = {0: 3, 1: 7, 2: 7, 3: 3}


def trajectories(folder: str) -> None:
    for stage, pieces in PIECES.items():
        optimizer, train = ADAMW | {"clip_norm": CLIP}, {"accumulate": pieces}
        engine = build(folder, optimizer=optimizer, dense={"zero_stage": stage}, train=train)
        for number, (loss, norm, wanted) in enumerate(plain(engine, CLIP)):
            where = f"step {number}, ZeRO {stage}, {pieces} pieces, {engine.world.size} workers"
            epoch, step = place(engine, number)
            terms, flag = engine.train_step(epoch, step, engine.samples(epoch, step), int(number == 1))
            assert flag == engine.world.size * (number == 1)
            assert sum(terms.values()) == pytest.approx(loss, rel=1e-6), where
            assert engine.grad_norm == pytest.approx(norm, rel=1e-5), where
            for name, value in weights(engine).items():
                difference = float((wanted[name] - value).abs().max())
                assert difference <= 1e-6, f"{name}: {difference}, {where}"


def without_a_module(folder: str) -> None:
    """Compare divided with undivided steps for a method that has only tables."""
    found = []
    for pieces in (1, 3, 7):
        method, train = {"name": "bprmf", "dim": 4}, {"accumulate": pieces}
        engine = build(folder, method=method, optimizer={"name": "sgd", "lr": 0.5}, train=train)
        for number in range(4):
            epoch, step = place(engine, number)
            engine.train_step(epoch, step, engine.samples(epoch, step))
        found.append(weights(engine))
    for other in found[1:]:
        assert all(float((value - found[0][name]).abs().max()) <= 1e-6 for name, value in other.items())


class Sometimes(torch.nn.Module):
    """A module whose second layer is used only on request."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(5, 3), torch.nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
        return self.second(self.first(x)) if both else self.first(x)


def unused_parameters() -> None:
    """Check that no step and no micro-batch uses a gradient left over from an earlier one."""
    from distrec.training.dense import DenseEngine

    world = World.current()
    for stage in (0, 1, 2, 3):
        torch.manual_seed(0)
        module = Sometimes()
        reference = copy.deepcopy(module)
        dense = DenseEngine(world, module, OptimizerSection(name="sgd"), DenseSection(zero_stage=stage))
        rule, generator = torch.optim.SGD(reference.parameters(), lr=0.1), torch.Generator().manual_seed(1)
        for passes in ([True], [False], [True, False], [False, True], [False, False]):
            rule.zero_grad()
            for number, both in enumerate(passes):
                x = torch.randn(4, 5, generator=generator)
                reference(x, both).sum().backward()
                dense.backward(dense(x, both).sum() / world.size, last=number == len(passes) - 1)
            rule.step()
            dense.step(0.1)
            found = dense.state()
            for name, value in reference.named_parameters():
                close = torch.allclose(found[f"{name}.weight"], value.detach(), rtol=1e-5, atol=1e-6)
                assert close, f"{name}, {passes}, ZeRO {stage}"


def everything(folder: str) -> None:
    quiet()
    unused_parameters()
    trajectories(folder)
    without_a_module(folder)


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_add_up_to_the_undivided_step(size: int, tmp_path: Path):
    run_workers(everything, size, write_data(tmp_path / "data"), timeout=300)


@pytest.mark.parametrize("name", ["lightgcn", "alignrec", "mentor", "stair", "popularity"])
def test_micro_batches_are_refused_if_rows_depend_on_each_other(name: str):
    with pytest.raises(InputError, match=f"key 'train.accumulate' is 2 but the loss of {name} is not a sum over"):
        resolve(run({"name": name}, train={"accumulate": 2}))


def test_micro_batches_are_refused_if_tables_are_updated_in_the_backward_pass():
    def bprmf(**optimizer: Any) -> RunConfig:
        return resolve(run({"name": "bprmf"}, train={"accumulate": 2}, optimizer=optimizer))

    with pytest.raises(InputError, match=r"key 'train.accumulate' must be 1 with 'optimizer.tables: sparse'"):
        bprmf(tables="sparse")
    assert bprmf().train.accumulate == 2
