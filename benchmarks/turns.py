"""Programs that do the same work, each in its own process; their losses are compared, then they take turns.

The first program is the project's own. It gives its start (weights and batches), the others start from the same, and
all report the losses of those batches. A ratio is the median over neighbouring turns, so that other load on the machine
affects both sides.
"""

from __future__ import annotations

import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np
import plain
import torch
import torch.distributed as dist

from distrec.config.run import RunConfig
from distrec.data.dataset import Dataset
from distrec.runtime import quiet, tune_process

PATIENCE = 1800  # seconds to wait for a program's answer


class Model(Protocol):
    """What a program's process calls on its model."""

    def epoch(self) -> Iterator[plain.Batch]:
        """The batches of an epoch."""

    def step(self, users: np.ndarray, positives: np.ndarray, negatives: np.ndarray) -> float:
        """Do one training step and return its loss."""


@dataclass(frozen=True)
class Program:
    """A program that takes part.

    Attributes:
        build: makes the model in the program's process from the first program's start (None for the first program).
        imports: the modules to import before memory is measured.
        tuned: whether the program gets the project's memory settings.
    """

    name: str
    build: Callable[[Start | None], Model]
    imports: tuple[str, ...] = ()
    tuned: bool = False


@dataclass(frozen=True)
class Start:
    """The common start of all programs.

    Attributes:
        weights: the initial values, by name.
        batches: the batches of the first steps, whose losses are compared.
        entries: the number of entries of each of the first program's graphs.
    """

    weights: dict[str, np.ndarray]
    batches: list[plain.Batch]
    entries: dict[str, int]


OURS_IMPORTS = ("deepspeed", "distrec.training.engine")


class Ours:
    """The project's own engine, with the interface of the plain programs."""

    def __init__(self, path: str, config: RunConfig):
        from distrec.parallel.world import World
        from distrec.training.engine import Engine

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        self.engine, self.steps = Engine(World.current(), Dataset.open(path), config), 0
        self.engine.set_lr(config.optimizer.lr)

    def epoch(self) -> Iterator[plain.Batch]:
        for step in range(self.engine.steps_per_epoch):
            triples = self.engine.samples(0, step)
            yield triples.users, triples.positives, triples.negatives

    def step(self, users: np.ndarray, positives: np.ndarray, negatives: np.ndarray) -> float:
        from distrec.data.sampling import Triples

        triples = Triples(users, positives, negatives, np.empty(0, np.int64))
        terms, _ = self.engine.train_step(0, self.steps, triples)
        self.steps += 1
        return sum(terms.values())

    def start(self, compared: int) -> Start:
        """The initial weights, under the plain programs' names, and the first batches."""
        tables = {name: self.engine.tables.block(name).detach() for name in self.engine.tables.specs}
        dense = {
            name.removesuffix(".weight"): x for name, x in self.engine.dense.state().items() if ".exp_" not in name
        }
        batches = [batch for _, batch in zip(range(compared), self.epoch(), strict=False)]
        entries = {name: graph.record()["my_entries"] for name, graph in self.engine.method.graphs().items()}
        return Start({name: x.numpy().copy() for name, x in (tables | dense).items()}, batches, entries)


def serve(pipe: Connection, program: Program, compared: int, start: Start | None) -> None:
    """A program's process: build the model, report losses, then do steps on request."""
    quiet()
    if program.tuned:
        tune_process(1)
    torch.set_num_threads(1)
    for module in program.imports:
        importlib.import_module(module)
    imported, model = resident("VmRSS"), program.build(start)
    if start is None:
        start = model.start(compared)  # type: ignore[attr-defined]
        pipe.send(start)
    pipe.send([model.step(*batch) for batch in start.batches])
    del start
    batches: Iterator[plain.Batch] = iter(())
    for threads, steps in iter(pipe.recv, None):
        torch.set_num_threads(threads)
        began, stepped = time.perf_counter(), 0.0
        for _ in range(steps):
            batch = next(batches, None)
            if batch is None:
                batches = model.epoch()
                batch = next(batches)
            middle = time.perf_counter()
            model.step(*batch)
            stepped += time.perf_counter() - middle
        pipe.send((time.perf_counter() - began, stepped))
    pipe.send((imported, resident("VmHWM")))


def resident(field: str) -> float:
    """Resident megabytes now (`VmRSS`) or at their peak (`VmHWM`; `ru_maxrss` would include the parent's peak)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))


@contextmanager
def running(
    programs: Sequence[Program], compared: int, tolerance: float
) -> Iterator[tuple[Start, dict[str, Connection]]]:
    """Start one process per program and compare losses of the first `compared` steps; yield the start and the pipes."""
    # On shared cores, the scheduler often keeps both threads of a process on one core, where they wait for each other.
    os.environ["OMP_PROC_BIND"] = "true"
    context, processes = get_context("spawn"), []
    pipes: dict[str, Connection] = {}
    start: Start | None = None
    ours: list[float] = []
    worst = 0.0
    try:
        for program in programs:
            pipes[program.name], end = context.Pipe()
            processes.append(context.Process(target=serve, args=(end, program, compared, start), daemon=True))
            processes[-1].start()
            end.close()
            if start is None:
                start = answer(pipes[program.name])
            losses = answer(pipes[program.name])
            ours = ours or losses
            worst = max(worst, *(abs(mine - its) / its for mine, its in zip(ours, losses, strict=True)))
        shown = f"{ours[0]:.6f} to {ours[-1]:.6f} over {compared} steps"
        print(f"  loss {shown}; largest relative difference {worst:.1e}", flush=True)
        if not worst <= tolerance:
            sys.exit("the losses differ")
        yield start, pipes
    finally:
        for process in processes:
            process.kill()
            process.join()


def answer(pipe: Connection) -> Any:
    if not pipe.poll(PATIENCE):
        raise TimeoutError(f"a program did not answer within {PATIENCE} s")
    return pipe.recv()


def turn(pipes: dict[str, Connection], threads: int, steps: int, sampling: bool) -> dict[str, float]:
    """The seconds of each program for `steps` steps, one program after the other, with or without sampling batches."""
    spent = {}
    for program, pipe in pipes.items():
        pipe.send((threads, steps))
        whole, stepped = answer(pipe)
        spent[program] = whole if sampling else stepped
    return spent


def report(turns: list[dict[str, float]], parts: int, what: str) -> float:
    """Print each program's milliseconds and its ratio to the first program; return the first's median seconds."""
    first = next(iter(turns[0]))
    for program in turns[0]:
        spent = sorted(row[program] * 1000 / parts for row in turns)
        ratio = statistics.median(row[program] / row[first] for row in turns)
        shown = "" if program == first else f"  {ratio:5.2f} x"
        middle = statistics.median(spent)
        print(f"    {program:20} {middle:9.1f} ms {what} ({spent[0]:.1f} to {spent[-1]:.1f}){shown}", flush=True)
    return statistics.median(row[first] for row in turns) / parts


def finish(pipes: dict[str, Connection]) -> None:
    """Print every program's peak memory and end the programs."""
    for program, pipe in pipes.items():
        pipe.send(None)
        imported, peak = answer(pipe)
        print(f"  {program:22} peak {peak:6.0f} MB, {peak - imported:5.0f} MB of it beyond imports")
