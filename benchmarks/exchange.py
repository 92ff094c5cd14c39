"""What a step exchanges between two gloo workers of one thread each, how long that takes, and how long gloo alone
takes.

    python benchmarks/exchange.py --data DIR [--steps 30] [--rounds 60]

DIR is the prepared dataset `baby`; AlignRec gets random features of width 768. Time inside collectives includes waiting
for the other worker. "Bare" is the same collective of torch.distributed on prepared buffers, in turns with the
project's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from training_step import BATCH, METHODS, run_config, with_features

from distrec.data.dataset import Dataset
from distrec.parallel.world import World
from distrec.runtime import quiet, tune_process

WORKERS = 2
METERED = ("sum_", "max_", "all_to_all", "gather_blocks", "reduce_blocks")


class Meter:
    """Counts time, calls and bytes of the project's exchanges, and of DeepSpeed's all-reduces, in this process."""

    def __init__(self, world: World) -> None:
        self._world, self._inside = world, False
        self.reset()
        for name in METERED:
            setattr(World, name, self._metered(name, getattr(World, name)))
        reduce = self._metered("deepspeed", lambda _, tensor, **named: all_reduce(tensor, **named))
        all_reduce = dist.all_reduce
        dist.all_reduce = lambda tensor, **named: reduce(world, tensor, **named)

    def reset(self) -> None:
        self.seconds, self.waited, self.made = 0.0, 0.0, []
        self.sent = dict.fromkeys((*METERED, "deepspeed"), 0)

    def _metered(self, name: str, exchange: Callable[..., Any]) -> Callable[..., Any]:
        def call(world: World, *arguments: Any, **named: Any) -> Any:
            if self._inside:  # sum_ calls all_reduce
                return exchange(world, *arguments, **named)
            self._inside, arrived = True, time.perf_counter()
            dist.barrier()  # so that the time of waiting for the other worker does not count as exchange
            started = time.perf_counter()
            self.waited += started - arrived
            try:
                return exchange(world, *arguments, **named)
            finally:
                self._inside = False
                self.seconds += time.perf_counter() - started
                self.made.append(lambda: exchange(world, *arguments, **named))
                self.sent[name] += sent_bytes(name, world.rank, *arguments)

        return call

    @torch.no_grad()
    def alone(self, rounds: int = 10) -> float:
        """Median seconds of the exchanges recorded since `reset`, back to back without computation between them."""
        made, self._inside, times = self.made, True, []
        for _ in range(rounds):
            dist.barrier()
            started = time.perf_counter()
            for exchange in made:
                exchange()
            times.append(time.perf_counter() - started)
        self._inside = False
        return statistics.median(times)


def sent_bytes(name: str, rank: int, rows: torch.Tensor, *rest: Any) -> int:
    """The bytes that this rank sends to others."""
    if name == "all_to_all":
        return rows.nbytes - rest[0][rank] * rows[:1].nbytes
    if name == "gather_blocks":
        return rows.nbytes * (WORKERS - 1)
    if name == "reduce_blocks":
        return rows.nbytes - rest[0].count(rank) * rows[:1].nbytes
    return 2 * rows.nbytes * (WORKERS - 1) // WORKERS


def steps(meter: Meter, world: World, path: str, method: str, count: int) -> None:
    """Print how a step's time and bytes are divided, as measured on rank 0."""
    from distrec.training.engine import Engine

    config = run_config(path, method)
    engine = Engine(world, Dataset.open(path), config)
    engine.set_lr(config.optimizer.lr)
    whole, exchanging, waiting = [], [], []
    for step in range(count + 3):
        triples = engine.samples(0, step % (engine.steps_per_epoch - 1))
        dist.barrier()
        meter.reset()
        started = time.perf_counter()
        engine.train_step(0, step, triples)
        whole.append(time.perf_counter() - started)
        exchanging.append(meter.seconds)
        waiting.append(meter.waited)
    calls, sent, alone = len(meter.made), dict(meter.sent), meter.alone()
    if world.rank == 0:
        total, inside, idle = (1000 * statistics.median(times[3:]) for times in (whole, exchanging, waiting))
        print(
            f"{method}: a step of {BATCH} takes {total:.1f} ms: {total - inside - idle:.1f} computing, {idle:.1f} "
            f"waiting for the other at {calls} barriers, {inside:.1f} in as many exchanges, which take "
            f"{1000 * alone:.1f} back to back"
        )
        listed = ", ".join(f"{name} {count / 2**20:.2f}" for name, count in sent.items() if count)
        print(f"  each worker sends {sum(sent.values()) / 2**20:.2f} MiB a step ({listed})")
        graph, row = engine.method.graphs()["user_item"].record(), 4 * config.method["dim"]
        hops = 2 * (len(engine.method.layer_weights) - 1)  # type: ignore[attr-defined]
        travels, everyone = (
            graph["rows_received_per_product"] * row,
            (engine.space.users.block + engine.space.items.block) * row,
        )
        print(
            f"  {2 * hops * travels / 2**20:.2f} MiB of it for {hops} hops over users and items, forward and backward, "
            f"where {graph['stays']} stay ({graph['exchange']}); "
            f"gathering all nodes' rows would send {hops * everyone / 2**20:.2f} MiB",
            flush=True,
        )


def collectives(path: str, rounds: int) -> None:
    """Time each of the project's exchanges against a collective that sends the same bytes."""
    from distrec.data.sampling import TripleSampler
    from distrec.parallel.exchange import batch_exchange
    from distrec.parallel.partition import Partition, share

    world, data, width = World.current(), Dataset.open(path), 64
    cases: dict[str, tuple[int, Callable[[], Any], Callable[[], Any]]] = {}
    for name, rows in (("items of Baby", data.items), ("3.4 MB a rank", 2 * 3_400_000 // (4 * width))):
        partition = Partition(rows, WORKERS)
        mine, count = torch.randn(partition.count(world.rank), width), partition.count(world.rank)
        padded, out = torch.randn(partition.block, width), torch.empty(partition.block * WORKERS, width)
        whole = torch.randn(rows, width)
        parts, split = torch.empty(WORKERS * count, width), [partition.count(rank) for rank in range(WORKERS)]
        cases[f"gather_blocks, {name}"] = (
            padded.nbytes,
            lambda mine=mine, partition=partition: world.gather_blocks(mine, partition),
            lambda out=out, padded=padded: dist.all_gather_into_tensor(out, padded),
        )
        cases[f"reduce_blocks, {name}"] = (
            whole.nbytes - mine.nbytes,
            lambda whole=whole, partition=partition: world.reduce_blocks(whole, partition),
            lambda a=parts, b=whole, c=[count] * WORKERS, d=split: dist.all_to_all_single(a, b, c, d),
        )
    partition = Partition(data.users, WORKERS)
    ids = torch.from_numpy(TripleSampler(data.interactions("train"), data.items, 1, "train").batch(0, 0, BATCH).users)
    exchange, _ = batch_exchange(world, partition, [ids[slice(*share(BATCH, r, WORKERS))] for r in range(WORKERS)])
    packed, received = torch.randn(sum(exchange._send), width), torch.empty(exchange.needed, width)
    cases["all_to_all of a batch's users"] = (
        sent_bytes("all_to_all", world.rank, packed, exchange._send),
        lambda: world.all_to_all(packed, exchange._send, exchange._receive),
        lambda: dist.all_to_all_single(received, packed, exchange._receive, exchange._send),
    )
    terms, bare_terms = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    cases["sum_ of a step's loss terms"] = (
        terms.nbytes, lambda: world.sum_(terms), lambda: dist.all_reduce(bare_terms)
    )  # fmt: skip
    if world.rank == 0:
        print(f"{'collective':32} {'sent MB':>8} {'ours ms':>9} {'bare ms':>9} {'ratio':>6}")
    for name, (nbytes, ours, bare) in cases.items():
        times: tuple[list[float], list[float]] = ([], [])
        for number in range(rounds + 3):
            for which in (number % 2, 1 - number % 2):
                dist.barrier()
                started = time.perf_counter()
                (ours, bare)[which]()
                times[which].append(1000 * (time.perf_counter() - started))
        if world.rank == 0:
            mine, its = (statistics.median(spent[3:]) for spent in times)
            print(f"{name:32} {nbytes / 1e6:8.3f} {mine:9.3f} {its:9.3f} {mine / its:6.2f}", flush=True)


def worker(rank: int, store: str, data: str, with_content: str, arguments: argparse.Namespace) -> None:
    quiet()
    tune_process(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORKERS), LOCAL_WORLD_SIZE=str(WORKERS))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORKERS)
    collectives(data, arguments.rounds)
    meter = Meter(World.current())
    for method in METHODS:
        steps(meter, World.current(), with_content if method == "alignrec" else data, method, arguments.steps)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the prepared dataset baby")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"{WORKERS} workers of one thread, gloo on loopback, load {os.getloadavg()[0]:.1f} before", flush=True)
    with with_features(arguments.data) as path, tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
        torch.multiprocessing.spawn(worker, (store, arguments.data, path, arguments), nprocs=WORKERS)


if __name__ == "__main__":
    main()
