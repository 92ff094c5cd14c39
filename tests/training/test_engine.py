"""The order of a step: what is told, what is refused before a weight moves, and what a restart takes over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distrec.config import RunConfig, decode
from distrec.data.dataset import Dataset
from distrec.errors import NonFiniteLoss
from distrec.methods.registry import resolve
from distrec.parallel.world import World
from distrec.runtime import quiet
from tests.distributed import run_workers
from tests.training.random_data import write_random


def build(folder: str, method: dict[str, Any], **optimizer: Any) -> Any:
    from distrec.training.engine import Engine

    tree = {"data": folder, "run": {"name": "r"}, "method": method, "optimizer": optimizer}
    config = resolve(decode(RunConfig, tree | {"train": {"global_batch": 50}}))
    return Engine(World.current(), Dataset.open(folder), config)


def step(engine: Any, number: int, lr: float = 1e-2) -> dict[str, float]:
    epoch, at = divmod(number, engine.steps_per_epoch)
    engine.set_lr(lr)
    share, terms, _ = engine.forward(engine.batch(epoch, at, engine.samples(epoch, at)))
    engine.update(share)
    return dict(terms)


def whole(engine: Any) -> dict[str, torch.Tensor]:
    """Every tensor of the state in one piece."""
    return {
        name: (value.full_tensor() if name.startswith("table.") else value).clone()
        for name, value in engine.state().items()
    }


def not_finite(folder: str, world: World) -> None:
    """A row of one rank is NaN: every rank names the term and the step, and no weight has moved."""
    engine = build(folder, {"name": "alignrec", "dim": 4})
    step(engine, 0)
    if world.rank == world.size - 1:
        engine.tables.block("user").data[-1] = torch.nan if world.size == 1 else torch.inf
    before = whole(engine)
    with pytest.raises(NonFiniteLoss, match=r"loss term '\w+' is (nan|inf|-inf) at epoch 3, step 2; weights were not"):
        engine.forward(engine.batch(2, 1, engine.samples(0, 0)))
    after = whole(engine)
    assert all(torch.equal(after[name], before[name]) or "user" in name for name in before)


def flags(folder: str, world: World) -> None:
    """One rank's flag is every rank's, and terms are those of the whole batch on all."""
    engine = build(folder, {"name": "lightgcn", "dim": 4})
    batch = engine.batch(0, 0, engine.samples(0, 0))
    assert engine.forward(batch)[2] is False
    share, terms, raised = engine.forward(batch, flag=world.rank == world.size - 1)
    assert raised is True
    total = torch.tensor([float(share.detach()), *terms.values()], dtype=torch.float64)
    world.sum_(total)
    assert float(total[0]) == pytest.approx(sum(terms.values()), rel=1e-5)
    assert np.allclose(total[1:].numpy(), np.array(list(terms.values())) * world.size)


def resumed(folder: str, world: World) -> None:
    """State written after three steps, loaded into a fresh engine: the fourth step is the same, bit for bit."""
    for optimizer in ({"name": "adam"}, {"name": "sgd"}):
        first = build(folder, {"name": "alignrec", "dim": 4}, **optimizer)
        assert whole(first).keys() == whole(build(folder, {"name": "alignrec", "dim": 4}, **optimizer)).keys()
        for number in range(3):
            step(first, number)
        second, saved = build(folder, {"name": "alignrec", "dim": 4}, **optimizer), first.state()
        target = second.state()
        for name, value in saved.items():
            if name.startswith("table."):
                target[name].to_local().copy_(value.to_local())
        second.load_dense(saved, 3)
        assert step(first, 3) == step(second, 3)
        found, wanted = whole(second), whole(first)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def seeds(folder: str) -> None:
    """Building an engine neither follows nor disturbs torch's own random numbers."""
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    first = whole(build(folder, {"name": "alignrec", "dim": 4}))
    assert torch.equal(torch.rand(3), wanted)
    second = whole(build(folder, {"name": "alignrec", "dim": 4}))
    assert all(torch.equal(first[name], second[name]) for name in first)


def untrained(folder: str) -> None:
    engine = build(folder, {"name": "popularity"})
    counts = np.bincount(Dataset.open(folder).interactions("train").item, minlength=engine.space.items.rows)
    final = engine.representations()
    scores = engine.method.score(final.users, final.items)
    mine = slice(engine.space.items.start(engine.world.rank), engine.space.items.stop(engine.world.rank))
    assert scores.shape == (engine.space.users.count(engine.world.rank), len(counts[mine]))
    assert np.array_equal(scores.numpy(), np.broadcast_to(counts[mine], scores.shape))
    assert engine.state() == {}
    with pytest.raises(RuntimeError, match="nothing to train"):
        engine.samples(0, 0)


def everything(folder: str) -> None:
    quiet()
    world = World.current()
    not_finite(folder, world)
    flags(folder, world)
    resumed(folder, world)
    seeds(folder)
    untrained(folder)


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [1, 2])
def test_a_step_is_whole_or_not_at_all(size: int, tmp_path: Path):
    run_workers(everything, size, write_random(tmp_path / "data", 31, 13, 152, 0), timeout=400)
