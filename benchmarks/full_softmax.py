"""Cross-entropy over all items, forward and backward: value, seconds and memory with 1 and 2 workers, and plain.

    python benchmarks/full_softmax.py [--items 100000] [--rows 2048] [--dim 64] [--turns 5]

Every worker has one thread and holds its part of the items and of the rows. "plain" is PyTorch's cross-entropy on the
product of both, in one process. Each program has its own processes, and programs run one at a time. Memory is how much
a process's peak grows from before the first step, on the worker where it grows most.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional

from distrec.methods.softmax import full_softmax
from distrec.parallel.partition import Partition, share
from distrec.parallel.world import World
from distrec.runtime import quiet, tune_process


def drawn(rows: int, items: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    vectors, catalogue = (torch.randn(n, dim, generator=generator) / 4 for n in (rows, items))
    return vectors, catalogue, torch.randint(0, items, (rows,), generator=generator)


def work(rank: int, folder: str, size: int, plain: bool, rows: int, items: int, dim: int, turns: int) -> None:
    torch.set_num_threads(1)
    if not plain:  # the project's memory settings; without them, freed blocks go back to the system
        tune_process(1)
    quiet()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    world = World.current()
    vectors, catalogue, targets = drawn(rows, items, dim)
    partition = Partition(items, size)
    counts = [high - low for low, high in (share(rows, rank, size) for rank in range(size))]
    first = sum(counts[:rank])
    mine = vectors[first : first + counts[rank]].clone().requires_grad_()
    block = catalogue[partition.start(rank) : partition.stop(rank)].clone().requires_grad_()
    del vectors, catalogue
    before, seconds, value = _peak(), [], 0.0
    for _ in range(turns + 1):
        world.barrier()
        started = time.perf_counter()
        if plain:
            loss = functional.cross_entropy(mine @ block.t(), targets)
        else:
            loss = full_softmax(mine, block, targets, counts, partition, world) / rows
        loss.backward()
        value = float(world.sum_(loss.detach().clone()))
        seconds.append(time.perf_counter() - started)
        mine.grad = block.grad = None
    grew = int(world.max_(torch.tensor(_peak() - before)))
    if rank == 0:
        name = "plain" if plain else f"distrec, {size} worker{'s' if size > 1 else ''}"
        line = (
            f"{name:20} loss {value:.6f}  {statistics.median(seconds[1:]):6.2f} s  "
            f"peak grew by {grew / 2**20:6,.0f} MiB a worker"
        )
        Path(folder, "line").write_text(line)
    dist.destroy_process_group()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    asked = parser.parse_args()
    for size, plain in ((1, True), (1, False), (2, False)):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(work, (folder, size, plain, asked.rows, asked.items, asked.dim, asked.turns), nprocs=size)
            print(Path(folder, "line").read_text(), flush=True)


if __name__ == "__main__":
    main()
