"""Polynomials of a linear operator against the plain sum of its powers, in float64, and their weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from distrec.graph.neighbours import item_graph
from distrec.graph.polynomial import Weight, decaying_powers, mean_of_powers, polynomial
from distrec.parallel.partition import Partition
from distrec.parallel.world import World
from tests.graph.neighbour_lists import counted, nearest_of, unit_vectors

LAYERS = range(5)
WIDTH = 6


def draws(seed: int) -> Callable[..., torch.Tensor]:
    """Normally distributed float64 arrays of any shape."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def weight_lists(layers: int, draw: Callable[..., torch.Tensor]) -> list[list[Weight]]:
    """Weights of both kinds: one number for each power, and one number for each column of each power."""
    scalars: list[Weight] = [float(weight) for weight in draw(layers + 1)]
    columns: list[Weight] = [draw(WIDTH) for _ in LAYERS[: layers + 1]]
    return [scalars, columns, mean_of_powers(layers), decaying_powers(draw(WIDTH).sigmoid(), layers, torch.float64)]


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize(("rows", "seed"), [(1, 0), (5, 1), (23, 2)])
def test_of_one_array_it_is_the_sum_of_powers(layers: int, rows: int, seed: int):
    draw = draws(seed)
    matrix, x = draw(rows, rows), draw(rows, WIDTH)
    before = x.clone()
    for weights in weight_lists(layers, draw):
        kept = [torch.as_tensor(weight).clone() for weight in weights]
        (found,) = polynomial(lambda y: (matrix @ y,), weights, x)
        wanted = sum(torch.linalg.matrix_power(matrix, power) @ x * weight for power, weight in enumerate(weights))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-11 * float(wanted.abs().max()))  # type: ignore[union-attr]
        assert torch.equal(x, before), "the input is left as it was"
        assert all(torch.equal(torch.as_tensor(weight), was) for weight, was in zip(weights, kept, strict=True))


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize(("users", "items", "seed"), [(4, 7, 0), (9, 2, 1), (1, 1, 2)])
def test_of_several_arrays_it_is_the_sum_of_powers_of_the_stack(layers: int, users: int, items: int, seed: int):
    draw = draws(seed)
    r, stack = draw(users, items), torch.zeros(users + items, users + items, dtype=torch.float64)
    stack[:users, users:], stack[users:, :users] = r, r.t()
    x, y = draw(users, WIDTH), draw(items, WIDTH)
    before = torch.cat([x, y])
    for weights in weight_lists(layers, draw):
        found = torch.cat(polynomial(lambda u, i: (r @ i, r.t() @ u), weights, x, y))
        wanted = sum(torch.linalg.matrix_power(stack, power) @ before * weight for power, weight in enumerate(weights))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-11 * float(wanted.abs().max()))  # type: ignore[union-attr]
        assert torch.equal(torch.cat([x, y]), before), "the inputs are left as they were"


@pytest.mark.parametrize("layers", LAYERS)
def test_decaying_weights_are_the_specification_s_and_sum_to_one(layers: int):
    """`(1 - c) / (1 - c^(L+1)) c^l` is `c^l / sum_k c^k`, which has no cancellation if c is near 1."""
    decay = torch.tensor([1e-12, 1e-3, 1.4e-3, 0.1, 0.5, 0.9, 0.99858, 1 - 1e-3], dtype=torch.float64)
    powers = torch.stack([decay**power for power in range(layers + 1)])
    exact = powers / powers.sum(0)
    found = torch.stack(decaying_powers(decay, layers, torch.float64))  # type: ignore[arg-type]
    torch.testing.assert_close(found, exact, rtol=2e-12, atol=0)
    torch.testing.assert_close(found.sum(0), torch.ones(len(decay), dtype=torch.float64), rtol=2e-12, atol=0)
    single = torch.stack(decaying_powers(decay.float(), layers))  # type: ignore[arg-type]
    rounded = decay.float().double()  # computed in float64 from the given values
    again = torch.stack(decaying_powers(rounded, layers, torch.float64))  # type: ignore[arg-type]
    assert single.dtype == torch.float32
    assert torch.equal(single, again.float())


@pytest.mark.parametrize("layers", LAYERS)
def test_the_mean_s_weights_sum_to_one(layers: int):
    weights = mean_of_powers(layers)
    assert len(weights) == layers + 1
    assert len(set(weights)) == 1
    assert sum(weights) == pytest.approx(1, rel=1e-15)


@pytest.mark.parametrize("layers", LAYERS)
def test_without_decay_it_is_the_identity(layers: int):
    draw = draws(layers)
    matrix, x = draw(8, 8), draw(8, WIDTH)
    for decay, gap in ((0.0, 0.0), (1e-300, 0.0), (1e-9, 1e-6)):
        weights = decaying_powers(torch.full((WIDTH,), decay), layers, torch.float64)
        (found,) = polynomial(lambda y: (matrix @ y,), weights, x)
        torch.testing.assert_close(found, x, rtol=0, atol=gap)


@pytest.mark.parametrize(("items", "neighbours", "seed"), [(12, [3], 0), (40, [5, 1], 1), (70, [2, 2, 4], 2)])
def test_the_leading_eigenvector_of_an_item_graph_stays(items: int, neighbours: list[int], seed: int):
    """`sqrt(degree)` is the eigenvector of `D^-1/2 W D^-1/2` with eigenvalue 1, and each column's weights sum to 1."""
    world, partition = World(0, 1), Partition(items, 1)
    features = [(unit_vectors(items, 8, seed + number), k) for number, k in enumerate(neighbours)]
    graph = item_graph(world, partition, nearest_of(world, partition, features), "symmetric")
    root = counted(features).sum(1).sqrt()
    leading = root.unsqueeze(1).repeat(1, WIDTH)
    decay = torch.linspace(0.1, 0.9986, WIDTH, dtype=torch.float64)
    other = unit_vectors(items, WIDTH, seed).double() * root.mean()
    for layers in LAYERS[1:]:
        weights = decaying_powers(decay, layers)
        (found,) = polynomial(lambda x: (graph.times_values(x),), weights, leading.float())
        torch.testing.assert_close(found.double(), leading, rtol=2e-6, atol=0)
        (moved,) = polynomial(lambda x: (graph.times_values(x),), weights, other.float())
        assert float((moved.double() - other).abs().max()) > 1e-2, "other vectors do not"
