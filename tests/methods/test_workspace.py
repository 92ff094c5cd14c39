"""The verbs of a workspace give the same on any number of workers as dense arrays in one process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from distrec.data.dataset import Interactions
from distrec.methods.workspace import Workspace
from distrec.parallel.world import World
from distrec.tables.spec import Side
from tests.distributed import run_workers

SIZES = [1, 2, 3, pytest.param(5, marks=pytest.mark.wide)]
USERS, ITEMS, WIDTH = 7, 4, 5  # of five workers, one has no items
SIDES: tuple[Side, Side] = ("user", "item")


def workspace(world: World, users: int = USERS, items: int = ITEMS) -> Workspace:
    counts: Any = SimpleNamespace(users=users, items=items)
    rng = np.random.default_rng(1)
    pairs = Interactions(rng.integers(0, users, 30), rng.integers(0, items, 30), np.zeros(30, np.int64))
    return Workspace(world, counts, pairs)


def drawn(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def entries() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    return rng.integers(0, USERS, 12), rng.integers(0, ITEMS, 12), rng.normal(size=12).astype(np.float32)


def used() -> dict[str, Any]:
    """What the verbs give on this worker; blocks are put together again."""
    space = workspace(World.current())
    out: dict[str, Any] = {"counts": {side: (space.count(side), space.my_count(side)) for side in SIDES}}
    for side in SIDES:
        whole = drawn(space.count(side), 3)
        mine = space.my_rows(side, whole)
        out[f"my {side}"] = whole_of(space, side, mine)
        pieces = list(space.pieces(side, 2))
        out[f"pieces {side}"] = len(pieces), torch.cat([mine[piece] for piece in pieces]).equal(mine)
        for kind in ("uniform", "normal"):
            out[f"{kind} {side}"] = whole_of(space, side, getattr(space, kind)(side, WIDTH, ("a key", 1)))
        anchors, candidates = (space.my_rows(side, drawn(space.count(side), seed)).requires_grad_() for seed in (3, 4))
        share = space.contrast(anchors, candidates, side, 0.2)
        share.backward()  # which gives every worker the gradient of the sum over workers
        out[f"contrast {side}"] = space.total(share.detach())
        out[f"contrast {side} gradients"] = [whole_of(space, side, x.grad) for x in (anchors, candidates)]
    items = space.my_rows("item", drawn(ITEMS, 5))
    out["matrix"] = whole_of(space, "user", space.matrix("user", "item", *entries()).times(items))
    out["place"] = space.my_rows("item", torch.arange(ITEMS))[space.place("item", torch.tensor([3, 0]))].tolist()
    out["pairs"] = space.distinct_pairs()
    out["any"] = space.any(torch.tensor(space.world.rank == space.world.size - 1)), space.any(torch.tensor(False))
    out["share"] = space.total(space.share(torch.tensor(6.0)))
    out["sample"] = space.sample(np.arange(1.0, 9.0), 3, ("edges", 1))
    return out


def whole_of(space: Workspace, side: Side, block: torch.Tensor | None) -> torch.Tensor:
    assert block is not None
    return space.world.gather_blocks(block.detach(), space.partitions[side]).clone()


def mean_nce(anchors: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    a, b = (functional.normalize(x.double(), dim=1) for x in (anchors, candidates))
    return functional.cross_entropy(a @ b.t() / 0.2, torch.arange(len(a)))


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", SIZES)
def test_verbs_are_those_of_dense_arrays(size: int) -> None:
    ranks = run_workers(used, size)
    assert sum(rank["counts"]["item"][1] for rank in ranks) == ITEMS
    user, item, value = entries()
    dense = torch.zeros(USERS, ITEMS).index_put_((torch.tensor(user), torch.tensor(item)), torch.tensor(value), True)
    space = workspace(World(0, 1))
    pairs = sorted(set(zip(space.train.user.tolist(), space.train.item.tolist(), strict=True)))
    for rank in ranks:
        for side, count in (("user", USERS), ("item", ITEMS)):
            assert rank["counts"][side][0] == count
            assert rank[f"my {side}"].equal(drawn(count, 3))
            assert rank[f"pieces {side}"] == (ranks[0][f"pieces {side}"][0], True)
            anchors, candidates = (drawn(count, seed).requires_grad_() for seed in (3, 4))
            wanted = mean_nce(anchors, candidates)
            wanted.backward()
            assert torch.allclose(rank[f"contrast {side}"].double(), wanted.detach(), rtol=1e-5)
            for found, leaf in zip(rank[f"contrast {side} gradients"], (anchors, candidates), strict=True):
                assert torch.allclose(found, leaf.grad, atol=1e-6)
        assert torch.allclose(rank["matrix"], dense @ drawn(ITEMS, 5), atol=1e-5)
        assert list(zip(*(numbers.tolist() for numbers in rank["pairs"]), strict=True)) == pairs
        assert rank["any"] == (True, False)
        assert float(rank["share"]) == pytest.approx(6.0)
        assert rank["sample"].tolist() == ranks[0]["sample"].tolist()
    assert sorted(number for rank in ranks for number in rank["place"]) == [0, 3]
    alone = used()
    for kind in ("uniform", "normal"):
        assert ranks[0][f"{kind} user"].equal(alone[f"{kind} user"])
        assert not ranks[0][f"{kind} user"][:ITEMS].equal(ranks[0][f"{kind} item"])


@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_a_sample_has_different_numbers_in_order(count: int) -> None:
    space = workspace(World(0, 1))
    for seed in range(20):
        found = space.sample(np.linspace(0.1, 1.0, 8), count, ("edges", seed))
        assert len(found) == count
        assert (np.diff(found) > 0).all()
        assert not count or (found[0] >= 0 and found[-1] < 8)


def test_numbers_are_drawn_in_proportion_to_their_weights() -> None:
    space, weights = workspace(World(0, 1)), np.array([1.0, 2.0, 5.0])
    first = np.bincount([int(space.sample(weights, 1, ("one", seed))[0]) for seed in range(4000)], minlength=3) / 4000
    assert np.abs(first - weights / 8).max() < 4 * np.sqrt(0.25 / 4000)
    # Of two without replacement, number 2 is left out if the others come first: 1/8 * 2/7 + 2/8 * 1/6.
    left = np.mean([2 not in space.sample(weights, 2, ("two", seed)) for seed in range(4000)])
    assert abs(left - (1 / 8 * 2 / 7 + 2 / 8 * 1 / 6)) < 4 * np.sqrt(0.08 / 4000)
