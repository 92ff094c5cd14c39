"""Moments over all entries of partitioned tables, in 1 to 3 processes, against PyTorch on whole tables in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from distrec.methods.moments import merged, moments_of, population_moments
from distrec.parallel.partition import Partition
from distrec.parallel.world import World
from tests.distributed import run_workers


@dataclass
class Case:
    """Tables. For each one, `rows` has the numbers of rows of its blocks, and `copies` how often it repeats them."""

    rows: list[list[int]]
    copies: list[int]
    width: int = 4
    offset: float = 0.0
    spread: float = 1.0


CASES = {
    "one block": Case([[17]], [1]),
    "users and items": Case([[17, 9]], [1]),
    "held twice": Case([[17, 9], [17, 9], [5, 3]], [1, 2, 3]),
    "mentor's four": Case([[31, 12]] * 4, [1, 2, 2, 2], width=8),
    "empty blocks": Case([[2, 1], [1, 7]], [1, 2], width=3),  # one or two of 3 workers have no row
    "one row": Case([[1]], [2], width=2),
    "far from zero": Case([[40, 13], [40, 13]], [1, 2], width=16, offset=1e4),
    "far from zero, narrow": Case([[300]], [2], width=8, offset=-1e4, spread=0.1),
    "blocks apart": Case([[20, 20]], [1], offset=0.0, spread=1e-3),
    "tiny": Case([[20, 9]], [2], spread=1e-6),
    "many rows": Case([[1500, 700]], [2], width=64, spread=0.01),
}


def blocks(case: Case) -> list[list[torch.Tensor]]:
    """Whole float32 blocks of each table; every second block is shifted, so that the mean of means is not the mean."""
    generator = torch.Generator().manual_seed(len(case.rows) + case.width)
    return [
        [
            case.offset + case.spread * (torch.randn(rows, case.width, generator=generator) + 3 * (number % 2))
            for number, rows in enumerate(table)
        ]
        for table in case.rows
    ]


def coefficients(case: Case) -> torch.Tensor:
    """The coefficients of variances and means in a loss `[tables, 2]`."""
    return torch.randn(len(case.rows), 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def exact(case: Case) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Moments `[tables, 2]` and gradients of the blocks, computed in float64 from the same float32 numbers."""
    leaves = [[block.double().requires_grad_() for block in table] for table in blocks(case)]
    entries = [
        torch.cat([block.flatten() for block in table] * copies)
        for table, copies in zip(leaves, case.copies, strict=True)
    ]
    moments = torch.stack([torch.stack([torch.var(values), torch.mean(values)]) for values in entries])
    (moments * coefficients(case)).sum().backward()
    return moments.detach(), [block.grad for table in leaves for block in table if block.grad is not None]


def sharded() -> dict[str, tuple[torch.Tensor, list[torch.Tensor]]]:
    """For each case, the moments, and the whole blocks' gradients of a loss of which every rank has an equal share."""
    world, out = World.current(), {}
    for name, case in CASES.items():
        whole = blocks(case)
        partitions = [[Partition(len(block), world.size) for block in table] for table in whole]
        mine = [
            [
                block[part.start(world.rank) : part.stop(world.rank)].clone().requires_grad_()
                for block, part in zip(*pair, strict=True)
            ]
            for pair in zip(whole, partitions, strict=True)
        ]
        moments = population_moments(world, mine, case.copies)
        assert moments.shape == (len(case.rows), 2)
        ((moments * coefficients(case)).sum() / world.size).backward()
        grads = [
            world.gather_blocks(block.grad, part).clone()  # type: ignore[arg-type]
            for pair in zip(mine, partitions, strict=True)
            for block, part in zip(*pair, strict=True)
        ]
        assert all(grad.dtype == torch.float32 for grad in grads)
        out[name] = moments.detach(), grads
    return out


def check(found: dict[str, tuple[torch.Tensor, list[torch.Tensor]]]) -> None:
    for name, case in CASES.items():
        moments, grads = found[name]
        wanted, wanted_grads = exact(case)
        where = f"{name}: {moments.tolist()} instead of {wanted.tolist()}"
        torch.testing.assert_close(moments[:, 0], wanted[:, 0], rtol=1e-5, atol=0, msg=where)
        deviation = wanted[:, 0].sqrt()
        assert ((moments[:, 1] - wanted[:, 1]).abs() <= 1e-7 * wanted[:, 1].abs() + 1e-6 * deviation).all(), where
        # Entries are rounded to half a unit in the last place, which matters relative to their distance from the mean.
        rounding = 1e-5 + 4 * 2**-24 * abs(case.offset) / case.spread
        for grad, exactly in zip(grads, wanted_grads, strict=True):
            largest = float(exactly.abs().max())
            torch.testing.assert_close(
                grad.double(), exactly, rtol=0, atol=rounding * largest, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_one_process_equals_the_whole():
    check(sharded())


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_equals_the_whole(size: int):
    ranks = run_workers(sharded, size)
    for found in ranks:
        check(found)
        assert all(torch.equal(found[name][0], ranks[0][name][0]) for name in CASES), "the same on every rank"


@pytest.mark.parametrize("seed", range(5))
def test_populations_merge_in_any_cut_and_empty_ones_count_nothing(seed: int):
    generator = torch.Generator().manual_seed(seed)
    values = 1e4 + torch.randn(60, generator=generator, dtype=torch.float64)
    cuts = torch.randint(0, 61, (4,), generator=generator).sort().values.tolist()
    parts = [values[low:high] for low, high in zip([0, *cuts], [*cuts, 60], strict=True)]
    count, mean, squares = merged([moments_of(part) for part in [values[:0], *parts, values[:0]]])
    assert count == 60
    assert mean == pytest.approx(float(values.mean()), rel=1e-13)
    assert squares / 59 == pytest.approx(float(values.var()), rel=1e-8)


def test_gradients_of_one_table_alone_leave_the_others_alone():
    world = World(0, 1)
    for table in range(2):
        for moment in range(2):
            leaves = [torch.randn(6, 3, generator=torch.Generator().manual_seed(k)).requires_grad_() for k in range(2)]
            population_moments(world, [[leaf] for leaf in leaves], [1, 2])[table, moment].backward()
            moved = [bool(leaf.grad.abs().max() > 0) for leaf in leaves if leaf.grad is not None]
            assert moved == [number == table for number in range(2)]
