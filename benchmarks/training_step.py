"""LightGCN epochs and AlignRec steps at Amazon Baby's size against plain single-process programs.

    python benchmarks/training_step.py --data DIR [--threads 1 2] [--turns 7]

DIR is the prepared dataset `baby`. AlignRec gets drawn features, 768 wide, since Baby has none. Each program has a
process of its own, as when it is run: the project's with its memory settings, the plain one without and once more with
them. They start from the same weights, their losses on the same batches are compared, and then they work in turns, an
epoch of LightGCN or ten steps of AlignRec each; a ratio is the median over neighbouring turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import plain
import torch
import torch.distributed as dist

from distrec.config.run import RunConfig
from distrec.data.dataset import Dataset, FeatureEntry, vector_table, write_manifest, write_part
from distrec.data.storage import open_folder
from distrec.runtime import quiet, tune_process

BATCH, WIDTH, COMPARED = 2048, 768, 10
PORTION = 10  # AlignRec steps of a turn; a turn of LightGCN is an epoch
METHODS = ("lightgcn", "alignrec")
PROGRAMS = ("distrec", "plain", "plain, tuned memory")


@contextmanager
def with_features(source: str) -> Iterator[str]:
    """A copy of a prepared dataset's interactions with drawn features, `WIDTH` wide; it ends with the block."""
    data, draw = Dataset.open(source), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as path:
        folder = open_folder(path)
        files = {name: entry for name, entry in data.manifest.files.items() if name.startswith("interactions/")}
        for name in files:
            folder.write_bytes(data.folder.read_bytes(name), *name.split("/"))
        values = draw.standard_normal((data.items, WIDTH), np.float32)
        part = "features/drawn/part-00000.parquet"
        files[part] = write_part(folder, part, vector_table(0, values, np.zeros(data.items, bool)))
        feature = FeatureEntry(width=WIDTH, dtype="float32", missing=0, source="drawn", parts=[part])
        manifest = data.manifest.model_copy(update={"features": {"drawn": feature}, "files": files, "content": {}})
        write_manifest(folder, manifest)
        yield path


def run_config(data: str, method: str, **sections: Any) -> RunConfig:
    """The shipped settings of the method for Baby; AlignRec's are its defaults."""
    from distrec.methods.registry import resolve

    chosen = {"name": "alignrec", "features": ["drawn"]} if method == "alignrec" else {"name": method}
    tree = {"data": data, "run": {"name": "benchmark"}, "method": chosen, **sections}
    tree["train"] = {"global_batch": BATCH, **tree.get("train", {})}
    return resolve(RunConfig.model_validate(tree))


class Ours:
    """The project's own engine, with the plain programs' few verbs."""

    def __init__(self, data: Dataset, config: RunConfig):
        from distrec.parallel.world import World
        from distrec.training.engine import Engine

        self.engine = Engine(World.current(), data, config)
        self.engine.set_lr(config.optimizer.lr)

    def epoch(self) -> Iterator[Any]:
        for step in range(self.engine.steps_per_epoch):
            yield self.engine.triples(0, step)

    def step(self, triples: Any) -> float:
        share, terms, _ = self.engine.forward(self.engine.batch(0, 0, triples))
        self.engine.update(share)
        return sum(terms.values())

    def start(self) -> tuple[dict[str, np.ndarray], list[plain.Batch]]:
        """Initial weights, by the plain programs' names, and the first batches."""
        tables = {name: self.engine.tables.block(name).detach() for name in self.engine.tables.specs}
        dense = {
            name.removesuffix(".weight"): x for name, x in self.engine.dense.state().items() if ".exp_" not in name
        }
        batches = [(t.users, t.positives, t.negatives) for _, t in zip(range(COMPARED), self.epoch(), strict=False)]
        return {name: x.numpy().copy() for name, x in (tables | dense).items()}, batches


def serve(pipe: Connection, program: str, method: str, path: str, start: Any) -> None:
    """A program's process: build, compare, then do steps when told."""
    quiet()
    if program != "plain":
        tune_process(1)
    torch.set_num_threads(1)
    data = Dataset.open(path)
    with tempfile.TemporaryDirectory() as folder:
        if program == "distrec":
            import deepspeed  # noqa: F401  imported before memory is read, like torchrec below

            import distrec.training.engine  # noqa: F401

            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
            imported, model = resident("VmRSS"), Ours(data, run_config(path, method))
            pipe.send(model.start())
            losses = [model.step(triples) for _, triples in zip(range(COMPARED), model.epoch(), strict=False)]
        else:
            weights, batches = start
            imported, model = resident("VmRSS"), plain.PROGRAMS[method](data, weights, BATCH, 1e-3)
            losses = [model.step(*batch) for batch in batches]
        pipe.send(losses)
        batches, stepped = iter(()), 0.0
        for threads, steps in iter(pipe.recv, None):
            torch.set_num_threads(threads)
            began, stepped = time.perf_counter(), 0.0
            for _ in range(steps):
                batch = next(batches, None)
                if batch is None:
                    batches = model.epoch()
                    batch = next(batches)
                middle = time.perf_counter()
                model.step(batch) if program == "distrec" else model.step(*batch)
                stepped += time.perf_counter() - middle
            pipe.send((time.perf_counter() - began, stepped))
        pipe.send((imported, resident("VmHWM")))


def resident(field: str) -> float:
    """Megabytes resident now (`VmRSS`) or at most so far (`VmHWM`; `ru_maxrss` would start at the parent's)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))


@contextmanager
def running(method: str, path: str) -> Iterator[dict[str, Connection]]:
    """One process per program, all started alike; their losses are compared on the way."""
    context, pipes, processes = get_context("spawn"), {}, []
    start: Any = None
    try:
        for program in PROGRAMS:
            pipes[program], end = context.Pipe()
            processes.append(context.Process(target=serve, args=(end, program, method, path, start), daemon=True))
            processes[-1].start()
            end.close()
            if start is None:
                start = answer(pipes[program])
            losses = answer(pipes[program])
            if program == "distrec":
                ours = losses
        worst = max(abs(mine - its) / its for mine, its in zip(ours, losses, strict=True))
        print(f"  loss {ours[0]:.6f} to {ours[-1]:.6f} over {COMPARED} steps; largest relative difference {worst:.1e}")
        if worst > 1e-5:
            sys.exit("the losses differ")
        yield pipes
    finally:
        for process in processes:
            process.kill()
            process.join()


def answer(pipe: Connection) -> Any:
    if not pipe.poll(300):
        raise TimeoutError("a program did not answer within 300 s")
    return pipe.recv()


def turn(pipes: dict[str, Connection], threads: int, steps: int, sampling: bool) -> dict[str, float]:
    """Seconds each program needs for `steps` steps, one program after the other, with or without drawing batches."""
    spent = {}
    for program, pipe in pipes.items():
        pipe.send((threads, steps))
        whole, stepped = answer(pipe)
        spent[program] = whole if sampling else stepped
    return spent


def report(turns: list[dict[str, float]], parts: int, what: str) -> None:
    for program in PROGRAMS:
        spent = sorted(row[program] * 1000 / parts for row in turns)
        ratio = statistics.median(row[program] / row["distrec"] for row in turns)
        shown = "" if program == "distrec" else f"  {ratio:5.2f} x"
        middle = statistics.median(spent)
        print(f"    {program:20} {middle:9.1f} ms {what} ({spent[0]:.1f} to {spent[-1]:.1f}){shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the prepared dataset baby")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=7, help="of each program")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    arguments = parser.parse_args()
    # On shared cores the scheduler often keeps both threads of a process on one of them, where each waits for the other.
    os.environ["OMP_PROC_BIND"] = "true"
    with with_features(arguments.data) as path:
        data = Dataset.open(path)
        steps = -(-data.manifest.interactions["train"] // BATCH)
        for method in arguments.methods:
            print(f"{method}: {data.users} users, {data.items} items, batches of {BATCH}, {steps} steps an epoch")
            with running(method, path) as pipes:
                for threads in arguments.threads:
                    print(f"  {threads} thread{'s' * (threads > 1)}, load {os.getloadavg()[0]:.1f} before", flush=True)
                    turn(pipes, threads, 2, sampling=True)  # warms up
                    if method == "lightgcn":
                        report([turn(pipes, threads, steps, True) for _ in range(arguments.turns)], 1, "an epoch")
                    else:
                        report(
                            [turn(pipes, threads, PORTION, False) for _ in range(arguments.turns)], PORTION, "a step"
                        )
                for program, pipe in pipes.items():
                    pipe.send(None)
                    imported, peak = answer(pipe)
                    print(f"  {program:22} peak {peak:6.0f} MB, of it {peak - imported:5.0f} MB beyond imports")


if __name__ == "__main__":
    main()
