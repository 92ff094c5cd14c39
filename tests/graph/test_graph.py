"""Sharded sparse products and neighbour graphs against dense algebra in float64, in 1 to 4 processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distrec.graph import knn
from distrec.graph.knn import cosine_neighbours
from distrec.graph.matrix import ShardedMatrix, inverse_sqrt
from distrec.graph.polynomial import mean_of_powers
from distrec.graph.sparse import Csr
from distrec.graph.user_item import UserItemGraph
from distrec.parallel.partition import Partition
from distrec.parallel.world import World
from tests.distributed import run_workers
from tests.graph.cases import SIZES, dense, normalised, pairs

WIDTH = 6


def mine(world: World, partition: Partition, whole: torch.Tensor) -> torch.Tensor:
    """My block of a whole array, in float32 and with gradient."""
    block = whole[partition.start(world.rank) : partition.stop(world.rank)]
    return block.float().requires_grad_()


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.detach().double(), wanted, rtol=1e-5, atol=2e-6)


def user_item(world: World) -> None:
    """Every product of `UserItemGraph`, forward and backward, against the dense adjacency."""
    for seed, (users, items) in enumerate(SIZES):
        user, item = pairs(users, items, seed)
        sides = Partition(users, world.size), Partition(items, world.size)
        graph = UserItemGraph(world, *sides, user, item)
        r = normalised(user, item, users, items)
        travels(world, graph, *sides, user, item)
        generator = torch.Generator().manual_seed(seed)
        draw = [torch.randn(count, WIDTH, generator=generator, dtype=torch.float64) for count in (users, items) * 2]
        whole_users, whole_items, user_weights, item_weights = draw
        my_users, my_items = (slice(side.start(world.rank), side.stop(world.rank)) for side in sides)

        block = mine(world, sides[1], whole_items)
        out = graph.to_users(block)
        close(out, (r @ whole_items)[my_users])
        (out * user_weights[my_users].float()).sum().backward()
        close(block.grad, (r.t() @ user_weights)[my_items])

        block = mine(world, sides[0], whole_users)
        out = graph.to_items(block)
        close(out, (r.t() @ whole_users)[my_items])
        (out * item_weights[my_items].float()).sum().backward()
        close(block.grad, (r @ item_weights)[my_users])

        adjacency, stacked = dense(user, item, users, items), torch.cat([whole_users, whole_items])
        weights = torch.cat([user_weights, item_weights])
        for layers in ([1.0], mean_of_powers(1), mean_of_powers(4), [0.0, 0.5, -2.0]):
            operator = sum(w * torch.linalg.matrix_power(adjacency, hop) for hop, w in enumerate(layers))
            blocks = mine(world, sides[0], whole_users), mine(world, sides[1], whole_items)
            outs = graph.propagate(*blocks, layers)
            wanted = operator @ stacked
            close(outs[0], wanted[:users][my_users])
            close(outs[1], wanted[users:][my_items])
            total = (outs[0] * user_weights[my_users].float()).sum() + (outs[1] * item_weights[my_items].float()).sum()
            total.backward()
            back = operator.t() @ weights
            close(blocks[0].grad, back[:users][my_users])
            close(blocks[1].grad, back[users:][my_items])

            # A loss that uses only one side gives gradients to both.
            blocks = mine(world, sides[0], whole_users), mine(world, sides[1], whole_items)
            (graph.propagate(*blocks, layers)[0] * user_weights[my_users].float()).sum().backward()
            back = operator.t() @ torch.cat([user_weights, torch.zeros_like(item_weights)])
            close(blocks[0].grad, back[:users][my_users])
            close(blocks[1].grad, back[users:][my_items])


def travels(
    world: World, graph: UserItemGraph, users: Partition, items: Partition, user: np.ndarray, item: np.ndarray
) -> None:
    """The record counts the rows that would move if either side stayed, and the side that stays is the cheaper one."""
    counted = {}
    for stays, rows, columns, row, column in (("users", users, items, user, item), ("items", items, users, item, user)):
        worst = 0
        for rank in range(world.size):
            needed = set(column[(row >= rows.start(rank)) & (row < rows.stop(rank))].tolist())
            worst = max(worst, len(needed - set(range(columns.start(rank), columns.stop(rank)))))
        counted[stays] = min(worst, columns.block * (world.size - 1))
    record = graph.record()
    assert record["rows_received_if_it_stayed"] == counted
    assert counted[record["stays"]] == min(counted.values())
    if world.size == 1:
        assert record["stays"] == ("users" if users.total >= items.total else "items")


def matrices(world: World) -> list[dict[str, object]]:
    """`ShardedMatrix` of several shapes: entries in any order, some of them twice, and a matrix without entries."""
    records = []
    for rows, columns, count in ((13, 7, 60), (3, 50, 20), (50, 3, 20), (1, 1, 1), (8, 8, 0)):
        rng = np.random.default_rng(rows)
        row, column = rng.integers(0, rows, count), rng.integers(0, columns, count)
        value = rng.normal(size=count).astype(np.float32)
        whole = torch.zeros(rows, columns, dtype=torch.float64)
        whole.index_put_((torch.from_numpy(row), torch.from_numpy(column)), torch.from_numpy(value).double(), True)
        sides = Partition(rows, world.size), Partition(columns, world.size)
        low, high = sides[0].start(world.rank), sides[0].stop(world.rank)
        own = (row >= low) & (row < high)
        matrix = ShardedMatrix(world, *sides, row[own], column[own], value[own])
        x = torch.from_numpy(rng.normal(size=(columns, WIDTH)))
        y = torch.from_numpy(rng.normal(size=(rows, WIDTH)))
        block = mine(world, sides[1], x)
        out = matrix.times(block)
        close(out, (whole @ x)[low:high])
        (out * y[low:high].float()).sum().backward()
        my_columns = slice(sides[1].start(world.rank), sides[1].stop(world.rank))
        close(block.grad, (whole.t() @ y)[my_columns])
        block = mine(world, sides[0], y)
        out = matrix.transposed_times(block)
        close(out, (whole.t() @ y)[my_columns])
        (out * x[my_columns].float()).sum().backward()
        close(block.grad, (whole @ x)[low:high])

        record = matrix.record()
        assert (record["rows"], record["columns"], record["my_entries"]) == (rows, columns, own.sum())
        needed = np.unique(column[own])
        remote = (needed < sides[1].start(world.rank)) | (needed >= sides[1].stop(world.rank))
        gathered = sides[1].block * (world.size - 1)
        if record["exchange"] == "boundary":
            assert record["rows_received_per_product"] == remote.sum() < gathered
        else:
            assert (record["exchange"], record["rows_received_per_product"]) == ("gather", gathered)
        records.append(record)
    return records


def neighbours(world: World) -> list[list[list[int]]]:
    """All ranks compute the lists of every case together, and each rank checks its own rows."""
    found_lists = []
    for items, width, k, seed in ((30, 8, 5, 0), (7, 3, 20, 1), (90, 384, 10, 2), (1, 4, 3, 3), (61, 13, 61, 4)):
        vectors = similar(items, width, seed)
        partition = Partition(items, world.size)
        rows = slice(partition.start(world.rank), partition.stop(world.rank))
        values, found = cosine_neighbours(world, partition, vectors[rows], k)
        assert values.shape == found.shape == (rows.stop - rows.start, min(k, items))
        exact = vectors.double() @ vectors.double().t()
        # Equal vectors have equal cosines, also in exact arithmetic on rounded vectors; other cosines are far apart.
        keys = [(-np.round(row, 6), np.arange(items)) for row in exact[rows].numpy()]
        wanted = [np.lexsort((column, key))[:k].tolist() for key, column in keys]
        assert found.tolist() == wanted
        close(values, exact[rows].gather(1, found))
        whole = torch.zeros(items, min(k, items), dtype=torch.int64)
        whole[rows] = found
        found_lists.append(world.sum_(whole).tolist())
    return found_lists


def similar(items: int, width: int, seed: int) -> torch.Tensor:
    """Unit vectors, a third of them equal; two vectors are zero (cosine 0 with all)."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(items, width, generator=generator)
    chosen = torch.randperm(items, generator=generator)
    vectors[chosen[: items // 3]] = vectors[chosen[0]].clone()
    vectors[chosen[-2:]] = 0 if items > 2 else vectors[chosen[-2:]]
    return torch.nn.functional.normalize(vectors, dim=1)


def in_blocks(world: World) -> list[list[list[int]]]:
    """`neighbours` with blocks smaller than the data, so that equal vectors occur at every place of a block."""
    knn._ROWS, knn._COLUMNS = 4, 7
    try:
        return neighbours(world)
    finally:
        knn._ROWS, knn._COLUMNS = 1024, 8192


def everything() -> tuple[list[dict[str, object]], list[list[list[int]]]]:
    world = World.current()
    user_item(world)
    whole, small = neighbours(world), in_blocks(world)
    assert whole == small
    return matrices(world), whole


@pytest.mark.parametrize("part", [user_item, matrices, neighbours, in_blocks])
def test_one_process(part):
    part(World(0, 1))


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_processes(size: int):
    alone, results = neighbours(World(0, 1)), run_workers(everything, size, timeout=400)
    assert all(lists == alone for _, lists in results)
    for case in zip(*(records for records, _ in results), strict=True):
        assert len({record["exchange"] for record in case}) == 1, "all ranks choose the same exchange"
    assert {record["exchange"] for records, _ in results for record in records} == {"gather", "boundary"}
    assert sum(record["my_entries"] for record in (records[0] for records, _ in results)) == 60


def test_local_products_add_equal_entries():
    for rows, columns, count in ((5, 4, 30), (1, 9, 3), (6, 6, 0)):
        rng = np.random.default_rng(count)
        row, column = rng.integers(0, rows, count), rng.integers(0, columns, count)
        value = rng.normal(size=count)
        whole = torch.zeros(rows, columns, dtype=torch.float64)
        whole.index_put_((torch.from_numpy(row), torch.from_numpy(column)), torch.from_numpy(value), accumulate=True)
        csr = Csr.from_entries(row, column, value, rows, columns)
        x = torch.from_numpy(rng.normal(size=(columns, 3)))
        close(csr.matmul(x.float()), whole @ x.float().double())


def test_an_isolated_node_has_no_weight():
    assert inverse_sqrt(np.array([0, 1, 4], np.float32)).tolist() == [0, 1, 0.5]


def test_the_mean_of_powers_counts_the_input():
    assert mean_of_powers(0) == [1]
    assert mean_of_powers(4) == pytest.approx([0.2] * 5)
