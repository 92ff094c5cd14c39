"""Symmetric neighbour graphs and lists without the item itself against dense float64, in 1 to 3 processes."""

from __future__ import annotations

import pytest
import torch

from distrec.graph import knn
from distrec.graph.knn import cosine_neighbours
from distrec.graph.neighbours import item_graph
from distrec.parallel.partition import Partition
from distrec.parallel.world import World
from tests.distributed import run_workers
from tests.graph.neighbour_lists import Features, counted, nearest, nearest_of, unit_vectors
from tests.oracle.gather import sparse_entries


def normalised(w: torch.Tensor) -> torch.Tensor:
    """`D^-1/2 W D^-1/2`."""
    scale = w.sum(1).rsqrt()
    return scale[:, None] * w * scale[None, :]


def cases() -> dict[str, Features]:
    return {
        "one modality": [(unit_vectors(30, 8, 0), 5)],
        "two modalities": [(unit_vectors(30, 8, 1), 5), (unit_vectors(30, 3, 2), 1)],
        "twice the same": [(unit_vectors(25, 6, 3), 4), (unit_vectors(25, 6, 3), 2)],
        "everyone near everyone": [(unit_vectors(7, 3, 4), 6), (unit_vectors(7, 5, 5), 1)],
        "two items": [(unit_vectors(2, 3, 6), 1), (unit_vectors(2, 3, 7), 1)],
        "all equal": [(unit_vectors(20, 4, 8, equal=1), 5), (unit_vectors(20, 4, 9, equal=1), 1)],
        "some equal, some zero": [(unit_vectors(31, 5, 10, 0.4, 3), 4), (unit_vectors(31, 9, 11, 0.2, 6), 1)],
        "all zero": [(unit_vectors(9, 4, 12, zero=9), 2)],
        "whole tiles": [(unit_vectors(130, 16, 13, 0.1), 5), (unit_vectors(130, 16, 14, 0.6), 1)],
    }


def graphs() -> dict[str, dict[tuple[int, int], float]]:
    """The entries of every case."""
    world, found = World.current(), {}
    for name, features in cases().items():
        partition = Partition(len(features[0][0]), world.size)
        matrix = item_graph(world, partition, nearest_of(world, partition, features), "symmetric")
        found[name] = sparse_entries(world, matrix)
    return found


def check_graphs(found: dict[str, dict[tuple[int, int], float]]) -> None:
    for name, features in cases().items():
        w = counted(features)
        wanted = normalised(w)
        dense = torch.zeros_like(wanted)
        for (row, column), value in found[name].items():
            dense[row, column] = value
        assert dense.isfinite().all(), name
        assert not dense.diagonal().any(), f"{name}: an item is its own neighbour"
        assert torch.equal(dense != 0, w != 0), f"{name}: other edges"
        torch.testing.assert_close(dense, wanted, rtol=1e-6, atol=0, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(dense, dense.t(), rtol=2e-7, atol=0)


def lists() -> list[list[list[int]]]:
    """Neighbours without the item itself, for every k up to one more than exist; each rank checks its own rows."""
    world, whole_lists = World.current(), []
    for items, width, equal, zero, seed in (
        (2, 3, 0.0, 0, 0),
        (9, 4, 0.5, 2, 1),
        (40, 7, 0.3, 1, 2),
        (12, 5, 1.0, 0, 3),
    ):
        vectors = unit_vectors(items, width, seed, equal, zero)
        partition = Partition(items, world.size)
        rows = slice(partition.start(world.rank), partition.stop(world.rank))
        exact = vectors.double() @ vectors.double().t()
        for k in {1, 2, items // 2, items - 1, items, items + 5} - {0}:
            values, found = cosine_neighbours(world, partition, vectors[rows], k, include_self=False)
            assert found.tolist() == nearest(vectors, min(k, items - 1))[rows].tolist(), (items, k)
            torch.testing.assert_close(values.double(), exact[rows].gather(1, found), rtol=1e-5, atol=1e-6)
            whole = torch.zeros(items, min(k, items - 1), dtype=torch.int64)
            whole[rows] = found
            whole_lists.append(world.sum_(whole).tolist())
    return whole_lists


def everything() -> dict[str, dict[tuple[int, int], float]]:
    """All checks twice: with the usual blocks, and with blocks smaller than the data."""
    found, found_lists, before = graphs(), lists(), (knn._ROWS, knn._COLUMNS)
    knn._ROWS, knn._COLUMNS = 4, 7
    try:
        assert graphs() == found
        assert lists() == found_lists
    finally:
        knn._ROWS, knn._COLUMNS = before
    return found


def test_one_process_equals_the_dense_graph():
    check_graphs(everything())


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_equals_the_dense_graph(size: int):
    results = run_workers(everything, size, timeout=400)
    assert all(found == results[0] for found in results)
    check_graphs(results[0])


def test_equal_items_choose_the_lowest_numbers():
    """If all rows are equal, items 0 to k - 1 are the neighbours of all items; they themselves also have item k."""
    assert nearest(unit_vectors(6, 3, 0, equal=1), 2).tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1], [0, 1]]
    w = counted([(unit_vectors(6, 3, 0, equal=1), 2)])
    assert w.sum(1).tolist() == [5, 5, 2, 2, 2, 2]


def test_the_weights_are_one_and_two():
    """An edge that both modalities choose counts twice, whichever end chose it, and never four times."""
    for name in ("two modalities", "twice the same", "some equal, some zero"):
        assert set(counted(cases()[name]).unique().tolist()) == {0, 1, 2}
    first = unit_vectors(25, 6, 3)
    smaller, larger = counted([(first, 2)]), counted([(first, 4)])
    assert torch.equal(counted(cases()["twice the same"]), smaller + larger), "the two nearest are among the four"
