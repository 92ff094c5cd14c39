"""The training loop in a Ray Train worker against the same loop in a process without Ray.

    python benchmarks/ray_overhead.py --data DIR [--method lightgcn] [--turns 60] [--portion 10]

DIR is the prepared dataset `baby`. Both processes are started as `distrec train` starts them (`train.workers` 1 and 0)
and run at the same time. They take turns of a few steps, so that other load on the machine affects both. A step covers
all that the loop does: sampling, forward, backward, update, ledger and progress file. The ratio is the median over
turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from multiprocessing import get_context
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from training_step import METHODS, run_config, with_features

from distrec.config.run import RunConfig
from distrec.data.dataset import Dataset
from distrec.runtime import quiet
from distrec.training.launch import workers_for
from distrec.training.loop import Trainer
from distrec.training.run_folder import RunFolder

KINDS = {"without Ray": 0, "Ray worker": 1}


class Paced(Trainer):
    """A trainer that stops after every portion of steps, reports how long it took, and waits for its next turn."""

    def pace(self, pipe: Connection) -> None:
        self._pipe, self._left, self._started = pipe, 0, 0.0
        pipe.send(self.world.size)
        self._wait()

    def _wait(self) -> None:
        self._left = self._pipe.recv()
        if not self._left:
            raise SystemExit
        self._started = time.perf_counter()

    def _progress(self, *arguments: Any) -> None:
        super()._progress(*arguments)
        self._left -= 1
        if self._left == 0:
            self._pipe.send(time.perf_counter() - self._started)
            self._wait()


def work(config: RunConfig) -> None:
    """Run one worker, whose turns the parent controls through a socket in the run's storage."""
    from distrec.parallel.world import World

    with Client(str(Path(config.run.storage, "socket"))) as pipe:
        trainer = Paced(World.current(), Dataset.open(config.data), config)
        trainer.pace(pipe)
        try:
            trainer.train()
        except SystemExit:
            pipe.send("done")


def launch(config: RunConfig) -> None:
    """Start the one worker of `config` as `distrec train` does."""
    quiet()
    RunFolder.of(config).open_attempt(config, Dataset.open(config.data).hash)
    with workers_for(config) as start:
        start("ray_overhead:work")  # this file is found by PYTHONPATH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the prepared dataset baby")
    parser.add_argument("--method", choices=METHODS, default="lightgcn")
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--portion", type=int, default=10, help="steps per turn")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    # Ray's workers import this file by name.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    context, pipes, processes = get_context("spawn"), {}, []
    with with_features(arguments.data) as path, tempfile.TemporaryDirectory() as folder:
        try:
            for kind, workers in KINDS.items():
                storage = Path(folder, f"workers-{workers}")
                storage.mkdir()
                config = run_config(
                    path,
                    arguments.method,
                    run={"name": "benchmark", "storage": str(storage)},
                    train={"workers": workers, "epochs": 1000, "eval_every": 1000},
                    tracking={"tensorboard": False},
                )
                with Listener(str(storage / "socket")) as listener:
                    processes.append(context.Process(target=launch, args=(config,)))
                    processes[-1].start()
                    pipes[kind] = accept(listener, 60)
                assert answer(pipes[kind]) == 1
            spent: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for turn in range(arguments.turns + 2):
                for kind in list(KINDS) if turn % 2 else list(KINDS)[::-1]:
                    pipes[kind].send(arguments.portion)
                    spent[kind].append(1000 * answer(pipes[kind]) / arguments.portion)
            print(
                f"{arguments.method}, 1 thread, load {os.getloadavg()[0]:.1f}, "
                f"{arguments.turns} turns of {arguments.portion} steps"
            )
            for kind, times in spent.items():
                times = sorted(times[2:])
                quarter = len(times) // 4
                print(
                    f"  {kind:12} {statistics.median(times):8.2f} ms a step "
                    f"(half within {times[quarter]:.2f} to {times[-quarter - 1]:.2f})"
                )
            ratios = sorted(a / b for a, b in zip(spent["Ray worker"][2:], spent["without Ray"][2:], strict=True))
            quarter = len(ratios) // 4
            print(
                f"  ratio        {statistics.median(ratios):8.3f} "
                f"(half within {ratios[quarter]:.3f} to {ratios[-quarter - 1]:.3f})"
            )
            for pipe in pipes.values():
                pipe.send(0)
                answer(pipe)
        finally:
            for process in processes:
                process.join(60)
                if process.is_alive():
                    process.terminate()


def accept(listener: Listener, seconds: float) -> Connection:
    """The first connection, waiting for at most `seconds`."""
    found: list[Connection] = []
    thread = threading.Thread(target=lambda: found.append(listener.accept()), daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        raise TimeoutError(f"no worker connected within {seconds:.0f} s")
    return found[0]


def answer(pipe: Connection) -> Any:
    if not pipe.poll(300):
        raise TimeoutError("a worker did not answer within 300 s")
    return pipe.recv()


if __name__ == "__main__":
    main()
