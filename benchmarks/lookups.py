"""Table look-ups with `optimizer.tables: sparse`: ids per second of forward, backward and fused update.

    python benchmarks/lookups.py [--rows 1000000 10000000 60000000] [--ids 65536] [--steps 10] [--turns 5]

One worker takes turns with fbgemm's operator, called directly on the same ids in the same process, if both tables fit
in 16 GiB. Two workers of one thread each share the same ids. Their step takes turns with a bare gloo all-to-all of the
same bytes (ids there, vectors back, gradients there) and with the step without exchange, in which each worker looks up
the ids that it is asked for with the bare operator. The time of the step beyond that is its exchange.
Ids are random with the skew of item popularity: an id is the floor of rows x u^3, with u uniform.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from distrec.config.run import OptimizerSection
from distrec.parallel.partition import Partition
from distrec.parallel.world import World
from distrec.runtime import quiet, tune_process
from distrec.tables.sharded import ShardedTables
from distrec.tables.spec import Table

DIM, LR = 64, 0.05
ROOM = 16 << 30  # bytes
OPTIMIZER = OptimizerSection(tables="sparse", lr=LR)


def zeros(key: tuple[str | int, ...], rows: int, dim: int, start: int, stop: int) -> np.ndarray:
    return np.zeros((stop - start, dim), np.float32)


def drawn(rows: int, count: int, seed: int) -> torch.Tensor:
    return torch.from_numpy((rows * np.random.default_rng(seed).random(count) ** 3).astype(np.int64))


def project(world: World, rows: int, ids: list[torch.Tensor], grad: torch.Tensor) -> Callable[[int], None]:
    """Run one step of the project's table."""
    tables = ShardedTables(
        world, [Table("item", "item", DIM, zeros)], {"item": Partition(rows, world.size)}, OPTIMIZER, seed=1
    )
    tables.set_sparse_lr(LR)

    def step(number: int) -> None:
        tables.lookup("item", ids[number % len(ids)]).backward(grad)
        tables.step(LR)

    return step


def direct(rows: int, ids: list[torch.Tensor], grad: torch.Tensor) -> Callable[[int], None]:
    """Run one step of fbgemm's operator with the same optimizer."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    operator = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=LR,
        pooling_mode=PoolingMode.NONE,
    )
    offsets = torch.tensor([0, len(ids[0])])

    def step(number: int) -> None:
        operator(ids[number % len(ids)], offsets).backward(grad)

    return step


def seconds(step: Callable[[int], None], steps: int) -> float:
    started = time.perf_counter()
    for number in range(steps):
        step(number)
    return (time.perf_counter() - started) / steps


def alone(rank: int, folder: str, rows: int, count: int, steps: int, turns: int) -> None:
    """Compare one worker with the bare operator."""
    tune_process(1)
    quiet()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    ids, grad = [drawn(rows, count, seed) for seed in range(4)], torch.full((count, DIM), 1e-3)
    timed = [project(World.current(), rows, ids, grad)]
    if 2 * rows * DIM * 4 <= ROOM:
        timed.append(direct(rows, ids, grad))
    for step in timed:
        seconds(step, 3)
    times = [[seconds(step, steps) for step in timed] for _ in range(turns)]
    mine = statistics.median(turn[0] for turn in times)
    beside = (
        f"{statistics.median(turn[0] / turn[1] for turn in times):.2f} of the operator's time" if len(timed) > 1 else ""
    )
    print(f"rows {rows:>11,}, 1 worker:  {count / mine / 1e6:6.2f} M ids/s  {beside}", flush=True)
    dist.destroy_process_group()


def shared(rank: int, folder: str, rows: int, count: int, steps: int, turns: int) -> None:
    """Compare, with two workers, the step, a bare exchange of its bytes, and the step without exchange."""
    tune_process(1)
    quiet()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    world = World.current()
    ids = [drawn(rows, count, seed)[rank::2].contiguous() for seed in range(4)]
    mine, grad = len(ids[0]), torch.full((len(ids[0]), DIM), 1e-3)
    step = project(world, rows, ids, grad)
    owners = [torch.bincount(Partition(rows, 2).owner(part), minlength=2).tolist() for part in ids]
    asked = [0, 0]
    for other in range(2):
        part = Partition(rows, 2).owner(drawn(rows, count, 0)[other::2])
        asked[other] = int((part == rank).sum())
    vectors = {"send": torch.ones(sum(asked), DIM), "receive": torch.empty(mine, DIM)}

    def bare(number: int) -> None:
        dist.all_to_all_single(torch.empty(sum(asked), dtype=torch.int64), ids[0], asked, owners[0])
        dist.all_to_all_single(vectors["receive"], vectors["send"], owners[0], asked)
        dist.all_to_all_single(vectors["send"], vectors["receive"], asked, owners[0])

    # The ids that this worker is asked for, as rows of a table of its own.
    block = Partition(rows, 2).block
    number = torch.cat([drawn(rows, count, 0)[other::2] for other in range(2)])
    asked_for = [number[Partition(rows, 2).owner(number) == rank] - rank * block]
    alone_step = direct(block, asked_for, torch.full((len(asked_for[0]), DIM), 1e-3))

    def local(number: int) -> None:
        alone_step(0)
        dist.barrier()

    for warm in (step, bare, local):
        seconds(warm, 3)
    times = []
    for _ in range(turns):
        turn = []
        for timed in (step, bare, local):
            dist.barrier()
            turn.append(seconds(timed, steps))
        times.append(turn)
    whole, exchange, without = (statistics.median(turn[at] for turn in times) for at in range(3))
    beyond = statistics.median(turn[0] - turn[2] for turn in times)
    if rank == 0:
        print(
            f"rows {rows:>11,}, 2 workers: {count / whole / 1e6:6.2f} M ids/s, step {whole * 1e3:.1f} ms, without "
            f"exchange {without * 1e3:.1f}; exchange {beyond * 1e3:.1f} ms, bare {exchange * 1e3:.1f}",
            flush=True,
        )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--ids", type=int, default=65_536)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    given = (arguments.ids, arguments.steps, arguments.turns)
    for rows in arguments.rows:
        for work, workers in ((alone, 1), (shared, 2)):
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(work, (folder, rows, *given), nprocs=workers)


if __name__ == "__main__":
    main()
