"""Full ranking by sequence models: users per second, and peak memory as users and items grow.

    python benchmarks/sequence_ranking.py [--methods sasrec bivrec] [--sizes 20000x10000 20000x100000 80000x10000]
        [--threads 2]

Every size is a random dataset (`distrec synth graph`, 20 interactions per user) and has its own process. The time is
that of an evaluation with initial weights: histories to vectors, scores of all items, masks and metrics. Memory is the
growth of the peak after the engine is built; the engine's tables and features are needed for training too.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist

from distrec.config.run import RunConfig
from distrec.config.tree import decode
from distrec.data.dataset import Dataset
from distrec.data.synth import GraphSize, write_graph
from distrec.runtime import quiet, tune_process

ROUNDS = 3


def resident() -> float:
    """The peak of resident memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(method: str, folder: str, threads: int) -> None:
    quiet()
    tune_process(threads)
    from distrec.methods.registry import resolve
    from distrec.parallel.world import World
    from distrec.training.engine import Engine
    from distrec.training.loop import build_evaluator

    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{method}", rank=0, world_size=1)
    tree = {"data": f"{folder}/data", "run": {"name": "run"}, "method": {"name": method}}
    config = resolve(decode(RunConfig, tree))
    data = Dataset.open(config.data)
    engine = Engine(World.current(), data, config)
    held_out = data.interactions("valid")
    before, seconds, parts = resident(), [], []
    with torch.no_grad():
        for _ in range(ROUNDS):
            started = time.perf_counter()
            final = engine.representations("valid")
            middle = time.perf_counter()
            ranked = build_evaluator(engine, "valid", held_out, config).rank(
                final.users, final.items, engine.method.score
            )
            seconds.append(time.perf_counter() - started)
            parts.append(middle - started)
    users, best = len(ranked.user), min(seconds)
    print(
        f"{method:8} {data.users:>8,} users {data.items:>8,} items: {users / best:>9,.0f} users/s "
        f"({best:.2f} s, of which vectors {min(parts):.2f}), "
        f"peak +{resident() - before:,.0f} MB over {before:,.0f} MB",
        flush=True,
    )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["sasrec", "bivrec"])
    parser.add_argument(
        "--sizes", nargs="+", default=["20000x10000", "20000x100000", "80000x10000"], help="USERSxITEMS"
    )
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    for size in arguments.sizes:
        users, items = map(int, size.split("x"))
        with tempfile.TemporaryDirectory() as folder:
            write_graph(str(Path(folder) / "data"), GraphSize(users, items, 20 * users, 64, 64, 7))
            for method in arguments.methods:
                process = get_context("spawn").Process(target=measure, args=(method, folder, arguments.threads))
                process.start()
                process.join()


if __name__ == "__main__":
    main()
