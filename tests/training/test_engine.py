"""A training step: what it returns, and what a restart restores. Losses that are not finite: test_every_method.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from distrec.config import RunConfig, decode
from distrec.data.dataset import Dataset
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
    return dict(engine.train_step(epoch, at, engine.samples(epoch, at))[0])


def whole(engine: Any) -> dict[str, torch.Tensor]:
    """Every tensor of the state in one piece."""
    return {
        name: (value.full_tensor() if name.startswith("table.") else value).clone()
        for name, value in engine.state().items()
    }


def unequal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


def flags(folder: str) -> list[dict[str, Any]]:
    """Two steps; in the second the last rank raises the flag 2."""
    engine, out = build(folder, {"name": "lightgcn", "dim": 4}), []
    samples = engine.samples(0, 0)
    for flag in (0, 2 if engine.world.rank == engine.world.size - 1 else 0):
        share = sum(float(term.detach()) for term in engine.method.loss(engine.batches(0, 0, samples)[0]).values())
        terms, raised = engine.train_step(0, 0, samples, flag)
        out.append({"share": share, "terms": terms, "raised": raised})
    return out


def resumed(folder: str) -> dict[str, dict[str, Any]]:
    """By optimizer: the fourth step of an engine, compared with that of a new one that loaded the state after three."""
    out = {}
    for optimizer in ("adam", "sgd"):
        first = build(folder, {"name": "alignrec", "dim": 4}, name=optimizer)
        fresh = whole(build(folder, {"name": "alignrec", "dim": 4}, name=optimizer))
        names = whole(first).keys(), fresh.keys()
        for number in range(3):
            step(first, number)
        second, saved = build(folder, {"name": "alignrec", "dim": 4}, name=optimizer), first.state()
        target = second.state()
        for name, value in saved.items():
            if name.startswith("table."):
                target[name].to_local().copy_(value.to_local())
        second.load_dense(saved, 3)
        terms = step(first, 3), step(second, 3)
        out[optimizer] = {
            "names": names[0] == names[1],
            "terms": terms,
            "unequal": unequal(whole(first), whole(second)),
        }
    return out


def seeds(folder: str) -> dict[str, Any]:
    """What torch draws after an engine is built, and whether a second engine has the same initial state."""
    torch.manual_seed(1)
    wanted = torch.rand(3).tolist()
    torch.manual_seed(1)
    first = whole(build(folder, {"name": "alignrec", "dim": 4}))
    drawn = torch.rand(3).tolist()
    return {"draws": (drawn, wanted), "unequal": unequal(first, whole(build(folder, {"name": "alignrec", "dim": 4})))}


def untrained(folder: str) -> dict[str, Any]:
    """Popularity's scores for my users and items, its state, and the error when it is asked for samples."""
    engine = build(folder, {"name": "popularity"})
    world, users, items = engine.world, engine.space.users, engine.space.items
    final, error = engine.representations(), None
    try:
        engine.samples(0, 0)
    except RuntimeError as raised:
        error = str(raised)
    counts = np.bincount(Dataset.open(folder).interactions("train").item, minlength=items.total)
    wanted = np.tile(counts[items.start(world.rank) : items.stop(world.rank)], (users.count(world.rank), 1))
    scores = engine.method.score(final.users, final.items).numpy()
    return {"scores": (scores, wanted), "state": engine.state(), "error": error}


CHECKS = (flags, resumed, seeds, untrained)


def all_checks(folder: str) -> dict[str, Any]:
    """The result of each check, or the exception that ended it.

    Nothing is asserted here: a rank that stopped early would leave the others waiting.
    """
    quiet()
    out: dict[str, Any] = {}
    for check in CHECKS:
        try:
            out[check.__name__] = check(folder)
        except Exception as error:
            out[check.__name__] = error
    return out


@pytest.fixture(scope="module", params=[1, 2])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """A function that returns a check's results, by rank."""
    folder = write_random(tmp_path_factory.mktemp("engine") / "data", 31, 13, 152, 0)
    of_ranks = run_workers(all_checks, request.param, folder, timeout=400)

    def of(check: Callable[[str], Any]) -> list[Any]:
        for outcome in (outcomes[check.__name__] for outcomes in of_ranks):
            if isinstance(outcome, Exception):
                raise outcome
        return [outcomes[check.__name__] for outcomes in of_ranks]

    return of


@pytest.mark.multiprocess
def test_every_rank_gets_the_flag_of_one_rank_and_the_terms_of_the_whole_batch(found: Any):
    for flag, steps in zip((0, 2), zip(*found(flags), strict=True), strict=True):
        assert [rank["raised"] for rank in steps] == [flag] * len(steps)
        assert all(rank["terms"] == steps[0]["terms"] for rank in steps)
        shares = sum(rank["share"] for rank in steps)
        assert shares == pytest.approx(sum(steps[0]["terms"].values()), rel=1e-5)


@pytest.mark.multiprocess
def test_a_step_after_loading_is_the_same_as_without_a_stop(found: Any):
    for rank in found(resumed):
        for optimizer, outcome in rank.items():
            assert outcome["names"], optimizer
            first, second = outcome["terms"]
            assert first == second, optimizer
            assert outcome["unequal"] == [], optimizer


@pytest.mark.multiprocess
def test_building_an_engine_neither_depends_on_nor_changes_the_random_state_of_torch(found: Any):
    for rank in found(seeds):
        drawn, wanted = rank["draws"]
        assert drawn == wanted
        assert rank["unequal"] == []


@pytest.mark.multiprocess
def test_a_method_that_does_not_train_ranks_and_has_no_state(found: Any):
    for rank in found(untrained):
        scores, wanted = rank["scores"]
        assert np.array_equal(scores, wanted)
        assert rank["state"] == {}
        assert "nothing to train" in (rank["error"] or "")
