"""Whitened features against the singular value decomposition in float64, in 1 to 3 processes."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from distrec.errors import InputError
from distrec.parallel.partition import Partition
from distrec.parallel.world import World
from distrec.tables import whitening
from distrec.tables.whitening import whitened
from tests.distributed import run_workers

# Items, width, dim, spread of the columns' scales (in powers of ten), offset of all columns.
SHAPES = [
    (30, 8, 8, 0.0, 0.0),
    (30, 8, 3, 1.0, 0.0),
    (12, 40, 5, 0.0, 2.0),
    (9, 20, 8, 0.0, 0.0),  # as many directions as centring leaves
    (50, 6, 1, 0.5, -3.0),
    (2, 4, 1, 0.0, 0.0),
    (101, 16, 16, 2.0, 10.0),
]


def features(shape: tuple[int, int, int, float, float]) -> torch.Tensor:
    items, width, _, spread, offset = shape
    draw = np.random.default_rng(items).normal(size=(items, width))
    return torch.from_numpy((draw * 10 ** np.linspace(0, -spread, width) + offset).astype(np.float32))


def by_svd(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The whitened features of docs/methods/stair.md section 3.4, and V `[width, dim]`, in float64.

    The entry of largest magnitude in each column of V is positive.
    """
    centred = x.double() - x.double().mean(0)
    left, _, right = torch.linalg.svd(centred, full_matrices=False)
    v = right[:dim].t()
    sign = v.gather(0, v.abs().argmax(0, keepdim=True)).sign()
    return left[:, :dim] * sign * (len(x) / dim) ** 0.5, v * sign


def spoiled() -> dict[str, tuple[torch.Tensor, int, int]]:
    """Features with too few independent directions, the number of these, and the number requested."""
    draw = np.random.default_rng(0).normal
    low = draw(size=(30, 3)) @ draw(size=(3, 8))
    row = np.random.default_rng(0).normal(size=(1, 7))
    return {
        "three of four": (torch.from_numpy(low.astype(np.float32)), 3, 4),
        "moved away from the origin": (torch.from_numpy((low + 5).astype(np.float32)), 3, 4),
        "as many as items": (torch.from_numpy(draw(size=(6, 9)).astype(np.float32)), 5, 6),
        "a constant column": (torch.from_numpy(np.c_[draw(size=(20, 2)), np.full(20, 0.3)].astype(np.float32)), 2, 3),
        "all zero": (torch.zeros(10, 4), 0, 1),
        "all rows equal": (torch.from_numpy(np.repeat(row, 35, 0).astype(np.float32)), 0, 2),
        "all rows equal, one requested": (torch.from_numpy(np.repeat(row, 35, 0).astype(np.float32)), 0, 1),
        "all but one row equal": (torch.cat([torch.ones(19, 5), torch.zeros(1, 5)]), 1, 2),
    }


def mine(world: World, x: torch.Tensor) -> tuple[Partition, torch.Tensor]:
    partition = Partition(len(x), world.size)
    return partition, x[partition.start(world.rank) : partition.stop(world.rank)]


def whole(x: torch.Tensor, dim: int) -> torch.Tensor:
    world = World.current()
    partition, block = mine(world, x)
    found = whitened(world, partition, block, dim, "text")
    assert found.dtype == torch.float32
    assert found.shape == (len(block), dim)
    return world.gather_blocks(found, partition).clone()


def refusal(x: torch.Tensor, dim: int) -> str:
    try:
        found = whole(x, dim)
    except InputError as error:
        return str(error)
    return f"accepted: {found[:2].tolist()} ..."


def everything() -> tuple[list[torch.Tensor], dict[str, str]]:
    found = [whole(features(shape), shape[2]) for shape in SHAPES]
    assert all(torch.equal(whole(features(shape), shape[2]), first) for shape, first in zip(SHAPES, found, strict=True))
    before, whitening._ROWS = whitening._ROWS, 4
    for shape, first in zip(SHAPES, found, strict=True):
        torch.testing.assert_close(whole(features(shape), shape[2]), first, rtol=0, atol=3e-7)
    whitening._ROWS = before
    return found, {name: refusal(x, dim) for name, (x, _, dim) in spoiled().items()}


@cache
def results(size: int) -> tuple[list[torch.Tensor], dict[str, str]]:
    if size == 1:
        return everything()
    ranks = run_workers(everything, size)
    for found, messages in ranks[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found, ranks[0][0], strict=True))
        assert messages == ranks[0][1]
    return ranks[0]


SIZES = [1, *(pytest.param(size, marks=pytest.mark.multiprocess) for size in (2, 3))]


@pytest.mark.parametrize("size", SIZES)
def test_results_are_the_scaled_singular_vectors(size: int):
    for shape, found in zip(SHAPES, results(size)[0], strict=True):
        wanted, _ = by_svd(features(shape), shape[2])
        torch.testing.assert_close(
            found.double(), wanted, rtol=0, atol=1e-6, msg=lambda text, shape=shape: f"{shape}: {text}"
        )


@pytest.mark.parametrize("size", SIZES)
def test_columns_are_centred_orthogonal_and_have_second_moment_one_over_dim(size: int):
    for (items, _, dim, _, _), found in zip(SHAPES, results(size)[0], strict=True):
        second = found.double().t() @ found.double() / items
        torch.testing.assert_close(second, torch.eye(dim, dtype=torch.float64) / dim, rtol=0, atol=1e-6)
        assert float(found.double().mean(0).abs().max()) < 1e-6


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [2, 3])
def test_the_result_does_not_depend_on_the_number_of_processes(size: int):
    for one, other in zip(results(1)[0], results(size)[0], strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=3e-7)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", spoiled())
def test_too_few_directions_are_refused(size: int, name: str):
    _, present, dim = spoiled()[name]
    message = results(size)[1][name]
    assert message.startswith(f"feature 'text' has {present} independent directions but 'method.dim' is {dim}"), message
    assert "lower 'method.dim'" in message


@pytest.mark.parametrize("shape", SHAPES)
def test_the_sign_depends_only_on_the_features(shape: tuple[int, int, int, float, float]):
    """Reordered or rescaled features give the same vectors; negated features give negated ones, as V is the same."""
    x, dim = features(shape), shape[2]
    found, order = whole(x, dim), torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(whole(x[order], dim), found[order], rtol=0, atol=1e-6)
    torch.testing.assert_close(whole(4 * x, dim), found, rtol=0, atol=1e-6)
    torch.testing.assert_close(whole(-x, dim), -found, rtol=0, atol=1e-6)
    _, v = by_svd(x, dim)
    loading = (x.double() - x.double().mean(0)).t() @ found.double()  # V's columns, scaled by their singular values
    largest = v.abs().argmax(0, keepdim=True)
    assert (loading.gather(0, largest) > 0).all()
