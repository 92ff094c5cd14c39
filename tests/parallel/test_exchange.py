"""Exchanges against plain indexing of the whole array, and against their adjoints, in 1 to 4 processes."""

from __future__ import annotations

import pytest
import torch

from distrec.parallel.exchange import BoundaryExchange, Exchange, GatherExchange, batch_exchange, planned_exchange
from distrec.parallel.partition import Partition
from distrec.parallel.world import World
from tests.distributed import run_workers

SHAPES: list[tuple[tuple[int, ...], torch.dtype]] = [
    ((), torch.float32),
    ((3,), torch.float32),
    ((2, 3), torch.float64),
]
ROWS = [1, 3, 23]  # also fewer rows than ranks, so that some blocks are empty


def draw(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Small whole numbers, whose sums are exact in any order, so that exchanges can be compared bit by bit."""
    return torch.randint(-50, 50, shape, generator=generator).to(dtype)


def check(world: World, partition: Partition, exchange: Exchange, needed: torch.Tensor, seed: int) -> None:
    """Check an exchange; `needed` has the global row that each row of `fetch` must be, and differs by rank."""
    generator = torch.Generator().manual_seed(seed)
    start, stop = partition.start(world.rank), partition.stop(world.rank)
    assert exchange.needed == len(needed)
    for shape, dtype in SHAPES:
        whole = draw(generator, partition.total, *shape, dtype=dtype)
        fetched = exchange.fetch_values(whole[start:stop].clone())
        assert fetched.dtype == dtype
        assert torch.equal(fetched, whole[needed])

        mine = draw(torch.Generator().manual_seed(seed + world.rank + 1), len(needed), *shape, dtype=dtype)
        pushed = exchange.push_values(mine.clone())
        wanted = torch.zeros(partition.total, *shape, dtype=dtype).index_add_(0, needed, mine)
        assert torch.equal(pushed, world.sum_(wanted)[start:stop])

        products = torch.stack([(fetched * mine).sum(), (whole[start:stop] * pushed).sum()]).double()
        left, right = world.sum_(products).tolist()
        assert left == right, "<fetch x, y> = <x, push y>"

        block = whole[start:stop].clone().requires_grad_()
        (exchange.fetch(block) * mine).sum().backward()
        assert torch.equal(block.grad, pushed)


def exchanges() -> None:
    world = World.current()
    generator = torch.Generator().manual_seed(5)
    for seed, rows in enumerate(ROWS):
        partition = Partition(rows, world.size)
        check(world, partition, GatherExchange(world, partition), torch.arange(rows), seed)

        for density in (0.0, 0.4, 1.0):
            wants = torch.rand(world.size, rows, generator=generator) < density
            wants[torch.randint(world.size, (), generator=generator)] = False  # one rank needs nothing
            needed_by = [row.nonzero().squeeze(1) for row in wants]
            needed = needed_by[world.rank]
            boundary = BoundaryExchange(world, partition, needed_by)
            check(world, partition, boundary, needed, seed)
            start, stop = partition.start(world.rank), partition.stop(world.rank)
            assert boundary.received == int(((needed < start) | (needed >= stop)).sum())

            planned, place = planned_exchange(world, partition, needed)
            whole = torch.arange(rows, dtype=torch.float64)
            assert torch.equal(planned.fetch_values(whole[start:stop])[place], needed.double())
            wanted = torch.arange(rows) if planned.strategy == "gather" else needed
            check(world, partition, planned, wanted, seed)

        for length in (0, 13):
            ids_of = [torch.randint(rows, (length * (rank != 1),), generator=generator) for rank in range(world.size)]
            exchange, place = batch_exchange(world, partition, ids_of)
            ids = ids_of[world.rank]
            check(world, partition, exchange, torch.unique(ids), seed)
            block = whole[start:stop].clone().requires_grad_()
            (exchange.fetch(block)[place]).sum().backward()
            counts = torch.bincount(torch.cat(ids_of), minlength=rows)[start:stop]
            assert torch.equal(block.grad, counts.double()), "repeated ids add up"


def choice() -> list[tuple[str, int, int]]:
    """The chosen strategy and the rows received if each rank needs its own rows and `extra` rows of its neighbour."""
    world, out = World.current(), []
    partition = Partition(40 * world.size, world.size)
    others_rows = 40 * (world.size - 1)
    for extra in (0, max(0, others_rows * 8 // 10 - 1), others_rows * 8 // 10, others_rows):
        lengths = [extra if rank == world.size - 1 else 0 for rank in range(world.size)]
        mine = torch.arange(partition.start(world.rank), partition.stop(world.rank))
        others = torch.tensor(
            [row for row in range(partition.total) if row not in set(mine.tolist())], dtype=torch.int64
        )
        needed = torch.cat([mine, others[: lengths[world.rank]]]).sort().values
        exchange, _ = planned_exchange(world, partition, needed)
        out.append((exchange.strategy, exchange.received, extra))
    return out


def worlds() -> None:
    """The collectives of `World` against arithmetic on whole arrays."""
    world = World.current()
    generator = torch.Generator().manual_seed(9)
    ranks = torch.arange(world.size, dtype=torch.float64)
    assert torch.equal(world.sum_(ranks[world.rank].clone()), ranks.sum())
    assert torch.equal(world.max_(ranks[world.rank].clone()), ranks.max())
    world.barrier()

    # The square root of a sum of squares over all ranks: every rank gets the gradient of the whole for its part.
    parts = draw(generator, world.size, 4) + 0.5
    mine = parts[world.rank].clone().requires_grad_()
    norm = world.total(mine.square().sum()).sqrt()
    (norm / world.size).backward()
    whole = parts.clone().requires_grad_()
    whole.square().sum().sqrt().backward()
    assert torch.allclose(norm.detach(), whole.square().sum().sqrt().detach())
    assert torch.allclose(mine.grad, whole.grad[world.rank])

    # The shares differ by rank, and the objective is their sum.
    mine.grad = None
    (world.total(mine.sum()) * (world.rank + 1)).backward()
    assert torch.equal(mine.grad, torch.full_like(mine, float(sum(range(1, world.size + 1)))))

    send = [[(sender + 2 * receiver) % 4 for receiver in range(world.size)] for sender in range(world.size)]
    rows = [draw(generator, sum(counts), 3) for counts in send]
    received = world.all_to_all(rows[world.rank], send[world.rank], [counts[world.rank] for counts in send])
    wanted = [rows[sender].split(send[sender])[world.rank] for sender in range(world.size)]
    if world.size > 1:
        assert torch.equal(received, torch.cat(wanted))

    for count in ROWS:
        partition = Partition(count, world.size)
        array = draw(generator, count, 2)
        block = array[partition.start(world.rank) : partition.stop(world.rank)]
        assert torch.equal(world.gather_blocks(block, partition), array)
        for start in range(0, count, 3):
            for stop in range(start + 1, count + 1, 5):
                assert torch.equal(world.chunk(block, partition, start, stop), array[start:stop])
        for rank in range(world.size):
            low, high = partition.start(rank), partition.stop(rank)
            assert torch.equal(world.rows_from(rank, block, 0, high - low), array[low:high])


def everything() -> list[tuple[str, int, int]]:
    worlds()
    exchanges()
    return choice()


def test_one_process_without_a_group():
    assert World.current() == World(0, 1)
    assert [strategy for strategy, _, _ in everything()] == ["gather"] * 4


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [2, 3, 4])
def test_exchanges_equal_plain_indexing_and_their_adjoints(size: int):
    chosen = run_workers(everything, size, timeout=400)
    for rank, found in enumerate(chosen):
        assert [strategy for strategy, _, _ in found] == ["boundary", "boundary", "gather", "gather"], "alike on all"
        for strategy, received, extra in found:
            wanted = 40 * (size - 1) if strategy == "gather" else extra if rank == size - 1 else 0
            assert received == wanted
