"""A rehearsal: one worker's part of a run, in few steps, with a stand-in for the other workers.

Everything that takes memory is done as in a run, by the same code: the worker imports what a worker imports, reads its
data, builds its graphs, trains, ranks and saves. So no method needs a formula for its memory, and what is measured is a
process's resident memory, with all that its allocator keeps. With workers, this process is one of Ray Train's.
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

STEPS = 3
"""The fewest training steps in each of the two epochs of a rehearsal."""

# Where sizes differ from step to step, freed blocks do not fit the next ones, and the heap grows for dozens of steps.
_STILL = 5  # steps in a row without growth that end the steps of an epoch
_NOISE = 1 << 20  # bytes that do not count as growth
_MOST_STEPS = 40
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
        steps: the fewest training steps in each of its two epochs.

    Raises:
        InputError: what the run would refuse too.
        WorkersFailed: the process died, or raised another error.
    """
    request = {"config": config.model_dump(), "workers": workers, "steps": steps}
    # A cluster that is connected is left alone: the dataset may be here only.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "distrec.sizing.rehearsal"],
            input=json.dumps({**request, "folder": folder}),
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            return Rehearsal(**json.loads(Path(folder, "answer.json").read_text(encoding="utf-8")))
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    if done.returncode == _BAD_INPUT:
        raise InputError(last)
    signal = done.returncode < 0
    ended = f"was killed by signal {-done.returncode}" if signal else f"ended with status {done.returncode}"
    raise WorkersFailed(f"the rehearsal of a worker {ended}: {shown(last, 300, quoted=False)}")


def _main() -> int:
    from distrec.training.launch import workers_for

    request = json.loads(sys.stdin.read())
    workers = request["workers"]
    one = {"train.workers": min(workers, 1), "train.cpus_per_worker": 1.0, "train.max_failures": 0}
    config = decode(RunConfig, set_keys(request.pop("config"), one, "rehearsal"))
    try:
        with workers_for(config) as start:
            start("distrec.sizing.rehearsal:rehearse_here", None, **request)
    except InputError as error:
        print(error, file=sys.stderr)
        return _BAD_INPUT
    return 0


def rehearse_here(config: RunConfig, workers: int, steps: int, folder: str) -> None:
    """Rehearse in this process, as the only worker, and write the result into `folder`; the rest as in `rehearse`."""
    import distrec.training.loop  # noqa: F401

    phases = {"process": high_water()}
    # Numbers are wrong here, so nothing may be written that a run would read.
    here = {"run.storage": folder, "run.name": "rehearsal", "run.graphs": None, "tracking.mlflow": None}
    config = decode(RunConfig, set_keys(config.model_dump(), here, "rehearsal"))

    from distrec.data.dataset import Dataset
    from distrec.parallel.world import World
    from distrec.sizing.held import held
    from distrec.sizing.standin import standing_in
    from distrec.training.checkpoint import Checkpoints
    from distrec.training.dense import leave_group
    from distrec.training.loop import Trainer
    from distrec.training.run_folder import RunFolder

    run = RunFolder.of(config)
    leave_group()  # of this worker alone; a larger one stands in for it
    with standing_in(max(workers, 1)) as group:
        world = World.current()
        checkpoints = Checkpoints(run.checkpoints, world)
        data = Dataset.open(config.data, checked=True)
        run.open_attempt(config, data.hash)
        trainer = Trainer(world, data, config, checkpoints)
        phases["build"] = high_water()
        seconds, received = [], 0
        engine = trainer.engine

        # Two epochs: what evaluation leaves behind is there in the second one, and its order is drawn then.
        for epoch, name in enumerate(("steps", "later epochs") if engine.method.trainable else ()):
            still = number = 0
            while number < min(engine.steps_per_epoch, _MOST_STEPS) and (number < steps or still < _STILL):
                before, began, highest = group.received, time.perf_counter(), high_water()
                samples = engine.samples(epoch, number)
                engine.train_step(epoch, number, samples)
                trainer.ledger.mark(world, samples.rows)
                seconds.append(time.perf_counter() - began)
                received = group.received - before
                still = still + 1 if high_water() <= highest + _NOISE else 0
                number += 1
            phases[name] = high_water()
            trainer.end_epoch()
            phases.setdefault("evaluation and checkpoint", high_water())
        trainer.cursor.best_checkpoint = None
        trainer.summarise()
        phases["test"] = high_water()
        growing = accumulate(phases.values(), max)  # the kernel's count varies by some pages
        phases = dict(zip(phases, growing, strict=True))
        found = Rehearsal(phases, held(trainer), received, seconds, engine.steps_per_epoch)
    Path(folder, "answer.json").write_text(json.dumps(asdict(found)), encoding="utf-8")


def high_water(process: int | str = "self") -> int:
    """Largest resident memory so far of this process, or of another one, in bytes.

    It is not taken from `getrusage`, whose number includes that of the process that started this one.
    """
    with open(f"/proc/{process}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))


if __name__ == "__main__":
    sys.exit(_main())
