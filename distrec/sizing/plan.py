"""What a run needs, found by rehearsing one of its workers: memory, checkpoints, exchanged bytes and time."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from distrec.config.bounds import MOST_WORKERS
from distrec.config.run import RunConfig
from distrec.config.tree import decode, set_keys
from distrec.data.dataset import Dataset
from distrec.data.manifest import Manifest
from distrec.errors import InputError
from distrec.methods.base import Method
from distrec.methods.registry import build_method, resolve
from distrec.runtime import total_memory
from distrec.sizing.likeness import MOST_SCORES, share_of, write_likeness
from distrec.sizing.rehearsal import STEPS, Rehearsal, rehearse
from distrec.training.attempts import with_absolute_paths
from distrec.training.size import checkpoint_bytes, dense_values, worker_parts

_MOST_ROWS = 6e6  # of training: minutes on one core, together with the steps
_MOST_PRODUCTS = 1e12  # in the search for neighbours among all pairs of items
_MOST_MEMORY = 0.25  # of this machine's memory, for the state of a rehearsed worker
_HELPS = 0.95  # of the peak: twice as many workers that need more than this do not help
_LARGE_BATCH = 0.05  # of a smaller dataset's interactions
_SMALLER = 0.5  # the share of the second rehearsal, from which and the first the rest is extrapolated


@dataclass(frozen=True)
class Needs:
    """What a run needs with a number of workers. Bytes are those of the worker that needs the most.

    Attributes:
        workers: number of workers; 0 is the process of the command.
        share: share of the dataset that was rehearsed: 1 is the dataset itself; less is a random one, and all numbers
            are extrapolated from it and from one of half its size.
        held: bytes that a worker holds between steps, by what they are.
        phases: largest resident memory from the start to the end of each phase, by name, in order.
        peak: largest resident memory.
        received: bytes that a step gets from other workers.
        checkpoint: bytes of a checkpoint, over all workers together.
        step_seconds: of a step on this machine, without waiting for other workers.
        steps: number of steps of an epoch.
    """

    workers: int
    share: float
    held: dict[str, int]
    phases: dict[str, int]
    peak: int
    received: int
    checkpoint: int
    step_seconds: float
    steps: int

    @property
    def processes(self) -> int:
        """Number of processes that train."""
        return max(self.workers, 1)

    @property
    def epoch_hours(self) -> float:
        """Hours of an epoch's steps on this machine, without waiting for other workers."""
        return self.step_seconds * self.steps / 3600

    def tree(self) -> dict[str, Any]:
        """As a JSON value."""
        return asdict(self) | {"epoch_hours": self.epoch_hours}


def plan(config: RunConfig, workers: Sequence[int] = (), steps: int = STEPS) -> list[Needs]:
    """What a run needs with each number of workers.

    Args:
        config: a run config.
        workers: numbers of workers; by default those of the config.
        steps: the fewest training steps to measure.

    Raises:
        InputError: the config is invalid, its dataset does not exist or lacks what the method reads, or the rehearsal
            itself does not fit into the memory of this machine.
        WorkersFailed: a rehearsal ended with another error.
    """
    config = with_absolute_paths(resolve(config))
    data = Dataset.open(config.data)
    method = build_method(config, data)
    numbers = workers or dict.fromkeys((config.train.least_workers, config.train.most_workers))
    for number in numbers:
        if config.train.global_batch < number:
            raise InputError(
                f"key 'train.global_batch' is {config.train.global_batch} but there are {number} workers; give each at "
                "least one row."
            )
    return [_plan(config, data, method, number, steps) for number in numbers]


def until_it_fits(config: RunConfig, plans: Sequence[Needs], machine: int, steps: int = STEPS) -> list[Needs]:
    """Plans for more workers too, twice as many each time, until one fits into a machine or more of them help little.

    Args:
        config: the run config.
        plans: those known already, for the most workers last.
        machine: bytes of memory of a machine.
        steps: as in `plan`.
    """
    found = list(plans)
    while found[-1].peak > machine:
        more = 2 * found[-1].processes
        if more > min(MOST_WORKERS, config.train.global_batch):
            break
        found += plan(config, [more], steps)
        if found[-1].peak > _HELPS * found[-2].peak and found[-2].workers:  # the first of many has Ray as well
            break
    return found


def worker_bytes(config: RunConfig) -> int:
    """The predicted peak memory of the hungriest worker in bytes, at the smallest number of workers of the config.

    It starts a local Ray cluster and rehearses there, which takes tens of seconds.

    Raises:
        InputError: the config is invalid, or its dataset does not exist or lacks what the method reads.
        WorkersFailed: the rehearsal ended with another error.
    """
    return plan(config, [config.train.least_workers])[0].peak


def _plan(config: RunConfig, data: Dataset, method: Method, workers: int, steps: int) -> Needs:
    parts = worker_parts(config, data, method, workers, dense_values(method))
    share = rehearsed_share(data.manifest, sum(method_widths(data, method)), sum(parts.values()))
    if share == 1:
        found = rehearse(config, workers, steps)
    else:
        found = _extrapolated(config, data.manifest, share, workers, steps)
    known = {name: parts[name] for name in ("dense module", "checkpoint being written")}
    if config.optimizer.tables == "exact":
        known["gradients of tables"] = parts["tables"]
    # Not part of a rehearsal, which saves to a local disk, and of a large dataset ranks some users only.
    copy, metrics = parts["checkpoint being written"], parts["metrics of all users"] if share < 1 else 0
    added = {"process": 0, "build": 0, "steps": copy}
    phases = {name: value + added.get(name, copy + metrics) for name, value in found.phases.items()}
    return Needs(
        workers=workers,
        share=share,
        held={name: value for name, value in (found.held | known).items() if value},
        phases=phases,
        peak=max(phases.values()),
        received=found.received,
        checkpoint=checkpoint_bytes(config, data, method, found.steps * config.train.global_batch)
        if method.trainable
        else 0,
        step_seconds=statistics.median(found.seconds[1:] or found.seconds or [0.0]),
        steps=found.steps,
    )


def method_widths(data: Dataset, method: Method) -> list[int]:
    """Numbers per item of each feature set that the method may search for neighbours; token sets are not searched."""
    return [entry.width for entry in map(data.feature, method.features()) if entry.tokens == 1]


def rehearsed_share(manifest: Manifest, width: int, state: int) -> float:
    """The share of a dataset that a rehearsal can deal with in time and memory; 1 is the dataset itself.

    Args:
        manifest: of the dataset.
        width: numbers per item of all feature sets in which neighbours are searched.
        state: bytes of a worker's state.
    """
    products = manifest.items**2 * width
    limits = [
        # The dataset itself has all its held-out users.
        1.0 if manifest.users * manifest.items <= MOST_SCORES else 0.99,
        _MOST_ROWS / manifest.interactions["train"],
        math.sqrt(_MOST_PRODUCTS / products) if products else 1.0,
        _MOST_MEMORY * total_memory() / state if state else 1.0,
    ]
    return min(1.0, *limits)


def _extrapolated(config: RunConfig, manifest: Manifest, share: float, workers: int, steps: int) -> Rehearsal:
    """A rehearsal of the whole run, on the line through two rehearsals with datasets that are like a share of it."""
    train, batch = manifest.interactions["train"], config.train.global_batch
    found: list[Rehearsal] = []
    shares = (share, _SMALLER * share)
    # How many different rows a large batch reads depends on how many there are. A share of the batch then reads that
    # share of the rows, which is linear; a small batch reads as many rows whatever the dataset's size.
    scaled = batch > _LARGE_BATCH * shares[-1] * train
    for part in shares:
        with tempfile.TemporaryDirectory() as folder:
            out = str(Path(folder, "data"))
            write_likeness(out, manifest, share_of(manifest, part))
            smaller: dict[str, object] = {"data": out}
            if scaled:
                smaller["train.global_batch"] = max(workers, round(part * batch))
            found.append(rehearse(decode(RunConfig, set_keys(config.model_dump(), smaller, "plan")), workers, steps))
    large, small = found

    def line(one: float, other: float) -> int:
        return round(max(one, one + (one - other) * (1 - share) / (share - shares[1])))

    return replace(
        large,
        phases={name: line(value, small.phases[name]) for name, value in large.phases.items()},
        held={name: line(value, small.held.get(name, 0)) for name, value in large.held.items()},
        received=line(large.received, small.received),
        seconds=[line(1e6 * one, 1e6 * other) / 1e6 for one, other in zip(large.seconds, small.seconds)],
        steps=large.steps if scaled else round(large.steps / share),
    )
