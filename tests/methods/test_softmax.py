"""The partitioned cross-entropy against PyTorch's cross-entropy over the whole catalogue."""

import pytest
import torch
from torch.nn import functional

from distrec.methods import softmax
from distrec.methods.softmax import full_softmax
from distrec.parallel.partition import Partition, share
from distrec.parallel.world import World
from tests.distributed import run_workers

# Rows, items, width. With 4 workers, one rank has none of 5 items, and two ranks have none of 2 rows.
CASES = [(13, 29, 6), (2, 5, 3), (40, 1, 2), (7, 64, 4)]


def drawn(
    rows: int, items: int, width: int, seed: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    vectors, catalogue = (scale * torch.randn(n, width, generator=generator) for n in (rows, items))
    return vectors, catalogue, torch.randint(0, items, (rows,), generator=generator)


def work(block_elements: int) -> list[tuple[float, torch.Tensor, torch.Tensor]]:
    """For every case, the loss summed over ranks, and the gradients of my rows and my items."""
    softmax._BLOCK_ELEMENTS = block_elements
    world, out = World.current(), []
    for seed, case in enumerate(CASES):
        vectors, catalogue, targets = drawn(*case, seed, 10.0 if seed % 2 else 1.0)
        counts = [high - low for low, high in (share(len(vectors), rank, world.size) for rank in range(world.size))]
        items = Partition(len(catalogue), world.size)
        first = sum(counts[: world.rank])
        mine = vectors[first : first + counts[world.rank]].requires_grad_()
        block = catalogue[items.start(world.rank) : items.stop(world.rank)].requires_grad_()
        total = full_softmax(mine, block, targets, counts, items, world)
        (3 * total).backward()
        out.append((float(world.sum_(total.detach().clone())), mine.grad, block.grad))
    return out


@pytest.mark.multiprocess
@pytest.mark.parametrize("block_elements", [1, 1 << 20])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_value_and_gradients_are_those_of_one_process(size: int, block_elements: int):
    results = run_workers(work, size, block_elements)
    for seed, case in enumerate(CASES):
        vectors, catalogue, targets = drawn(*case, seed, 10.0 if seed % 2 else 1.0)
        leaves = [x.double().requires_grad_() for x in (vectors, catalogue)]
        wanted = functional.cross_entropy(leaves[0] @ leaves[1].t(), targets, reduction="sum")
        (3 * wanted).backward()
        for result in results:
            assert result[seed][0] == pytest.approx(float(wanted.detach()), rel=1e-6, abs=1e-5)
        for number, leaf in enumerate(leaves, 1):
            found = torch.cat([result[seed][number] for result in results]).double()
            torch.testing.assert_close(found, leaf.grad, rtol=1e-5, atol=2e-5)
