"""A rehearsal: one worker's part of a run, in few steps, with a stand-in for the other workers.

Everything that takes memory is done as in a run, by the same code: the worker imports what a worker imports, reads its
data, builds its graphs, trains, ranks and saves. So no method needs a formula for its memory, and what is measured is a
process's resident memory, with all that its allocator keeps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

from distrec.config.run import RunConfig
from distrec.config.tree import decode, set_keys
from distrec.errors import InputError, WorkersFailed, shown
from distrec.runtime import WORKER_ENVIRONMENT, tune_process

STEPS = 3  # the first allocates gradients; the second has them and what the first one left; a third is like it
_BAD_INPUT = 2


@dataclass(frozen=True)
class Rehearsal:
    """What was measured in a worker's process.

    Attributes:
        phases: largest resident memory in bytes from the start to the end of each phase, by name, in order.
        held: bytes that the worker holds between steps, by what they are (`distrec.sizing.held`).
        received: bytes that a step gets from other workers.
        seconds: of each step, without waiting for other workers.
        steps: number of steps of a whole epoch.
    """

    phases: dict[str, int]
    held: dict[str, int]
    received: int
    seconds: list[float]
    steps: int


def rehearse(config: RunConfig, workers: int, steps: int = STEPS) -> Rehearsal:
    """Rehearse the work of the hungriest of `workers` workers in a process of its own.

    Args:
        config: a resolved run config.
        workers: number of workers; 0 trains in the process of the command.
        steps: number of training steps to do.

    Raises:
        InputError: what the run would refuse too.
        WorkersFailed: the process died, or raised another error.
    """
    request = {"config": config.model_dump(), "workers": workers, "steps": steps}
    environment = {**os.environ, **WORKER_ENVIRONMENT} if workers else dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        request["folder"] = folder
        done = subprocess.run(
            [sys.executable, "-m", "distrec.sizing.rehearsal"],
            input=json.dumps(request),
            env={**environment, "TQDM_DISABLE": "1"},
            capture_output=True,
            text=True,
        )
        answer = Path(folder, "answer.json")
        if done.returncode == 0:
            return Rehearsal(**json.loads(answer.read_text(encoding="utf-8")))
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    if done.returncode == _BAD_INPUT:
        raise InputError(last)
    ended = (
        f"ended with status {done.returncode}" if done.returncode > 0 else f"was killed by signal {-done.returncode}"
    )
    raise WorkersFailed(f"the rehearsal of a worker {ended}: {shown(last, 300, quoted=False)}")


def _main() -> int:
    request = json.loads(sys.stdin.read())
    try:
        found = _rehearse(decode(RunConfig, request["config"]), request["workers"], request["steps"], request["folder"])
    except InputError as error:
        print(error, file=sys.stderr)
        return _BAD_INPUT
    Path(request["folder"], "answer.json").write_text(json.dumps(asdict(found)), encoding="utf-8")
    return 0


def _rehearse(config: RunConfig, workers: int, steps: int, folder: str) -> Rehearsal:
    from distrec.runtime import quiet

    quiet()
    tune_process(config.train.threads)
    phases: dict[str, int] = {}
    if workers:
        import ray.train  # as in a worker
        import ray.train.torch  # noqa: F401

    # Numbers are wrong here, so nothing may be written that a run would read.
    here = {"run.storage": folder, "run.name": "rehearsal", "run.graphs": None, "tracking.mlflow": None}
    config = decode(RunConfig, set_keys(config.model_dump(), here, "rehearsal"))

    from distrec.data.dataset import Dataset
    from distrec.parallel.world import World
    from distrec.sizing.held import held
    from distrec.sizing.standin import standing_in
    from distrec.training.checkpoint import Checkpoints
    from distrec.training.loop import Trainer
    from distrec.training.run_folder import RunFolder

    run = RunFolder.of(config)
    phases["process"] = high_water()
    with standing_in(max(workers, 1)) as group:
        world = World.current()
        checkpoints = Checkpoints(run.checkpoints, world)
        data = Dataset.open(config.data, checked=True)
        run.open_attempt(config, data.hash)
        trainer = Trainer(world, data, config, checkpoints)
        phases["build"] = high_water()
        seconds, received = [], 0
        engine = trainer.engine

        def step(epoch: int, number: int) -> None:
            samples = engine.samples(epoch, number)
            engine.train_step(epoch, number, samples)
            trainer.ledger.mark(world, samples.rows)
            trainer.cursor.step += 1

        trains = engine.method.trainable
        for number in range(min(steps, engine.steps_per_epoch) if trains else 0):
            before, began = group.received, time.perf_counter()
            step(0, number)
            seconds.append(time.perf_counter() - began)
            received = group.received - before
        phases["steps"] = high_water()
        if trains:
            trainer.end_epoch()
            step(1, 0)  # the order of the next epoch is drawn while the evaluation's arrays are there
        phases["evaluation and checkpoint"] = high_water()
        trainer.cursor.best_checkpoint = None
        trainer.summarise()
        phases["test"] = high_water()
        highest = accumulate(phases.values(), max)  # the kernel's count varies by some pages
        phases = dict(zip(phases, highest, strict=True))
        return Rehearsal(phases, held(trainer), received, seconds, engine.steps_per_epoch if trains else 0)


def high_water() -> int:
    """Largest resident memory of this process so far, in bytes.

    It is not taken from `getrusage`, whose number includes that of the process that started this one.
    """
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))


if __name__ == "__main__":
    sys.exit(_main())
