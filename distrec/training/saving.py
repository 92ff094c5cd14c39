"""When the checkpoints of a run are written, and which are kept; `distrec.training.checkpoint` says what is in one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from distrec.parallel.world import World
from distrec.training.alike import alike
from distrec.training.checkpoint import Checkpoints, Mine
from distrec.training.run_folder import RunFolder

SAVE, STOP = 1, 2
"""What rank 0 asks of all ranks with the flag of a step: to save a checkpoint after it, or to save one and stop."""


@dataclass
class Cursor:
    """How far training has come, and its results so far; saved as `state.json` of a checkpoint."""

    epoch: int = 0
    step: int = 0
    optimizer_steps: int = 0
    term_sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    replayed: int = 0
    best_epoch: int | None = None
    best_value: float = -1.0
    best_checkpoint: str | None = None
    evaluations_since_best: int = 0
    stopped: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Job:
    name: str
    mine: Mine
    state: dict[str, Any]
    needed: set[str]
    started: float
    then: Callable[[float], None]


class Saver:
    """Saves the checkpoints of a run while it trains, and deletes those that it does not need any more. Collective.

    On a local disk, `save` returns when the checkpoint is complete: the copy that a later write needs would take half
    as long (benchmarks/2026-11-30-checkpoint.md). For an object store, `save` copies this rank's tensors and returns,
    and a thread writes the copy while training goes on. One save at a time is in flight: the next one waits for it, and
    so does the end of the block. The thread's collectives have a process group of their own, and its errors are the
    same on every rank.

    Args:
        checkpoints: those of the run.
        run: its folder.
        require: raises TakenOver if the run is not ours any more; called on rank 0 before a save writes anything, and
            again before it completes the checkpoint.
    """

    def __init__(self, checkpoints: Checkpoints, run: RunFolder, require: Callable[[], None]):
        self._checkpoints, self._run, self._require = checkpoints, run, require
        self.newest: str | None = None
        """The newest complete checkpoint."""
        self._kept: set[str] = set()  # the checkpoints that it needs
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._saved = time.monotonic()
        self._slowest = 0.0
        self.at_once = checkpoints.folder.local
        """Whether `save` writes before it returns."""

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception):  # after a second Ctrl-C nothing is awaited
            with suppress(Exception):  # the error at hand came first
                self.wait()

    def resume(self, newest: str | None, needed: set[str]) -> None:
        """Begin at checkpoint `newest`, which needs the checkpoints `needed`; delete those never completed."""
        self.newest, self._kept = newest, needed
        with alike(self._checkpoints.world):
            if self._checkpoints.world.rank == 0:
                self._require()  # a later attempt may be writing one
                self._checkpoints.remove_torn()

    def due(self, minutes: float) -> bool:
        """Whether the last save was `minutes` ago (0: never), or has failed in the background; then the next raises."""
        if self._thread is not None and self._thread.is_alive():
            return False
        return self._error is not None or 0 < 60 * minutes <= time.monotonic() - self._saved

    def save(
        self,
        name: str,
        tensors: dict[str, torch.Tensor],
        state: dict[str, Any],
        needed: set[str],
        started: float,
        then: Callable[[float], None],
    ) -> None:
        """Save checkpoint `name`.

        When it is complete, all checkpoints are deleted except those that it or the one before needs. That one stays,
        to continue from it should the new one be damaged.

        Args:
            tensors, state: as `Checkpoints.save` takes them.
            needed: the names of the checkpoints that a run needs to continue from this one.
            started: when training stopped for it, by `time.perf_counter`.
            then: called on rank 0 when the checkpoint is complete, with the seconds for which training stopped.

        Raises:
            StorageFull: the local disk has no room for it.
            TakenOver: a later attempt has taken over the run.
            Exception: what ended the save before, in the background; the same on every rank.
        """
        self.wait()
        job = _Job(name, self._checkpoints.mine(tensors, copy=not self.at_once), state, needed, started, then)
        if self.at_once:
            self._write(job, self._checkpoints.world, None)
            return
        stopped = time.perf_counter() - started
        self._thread = threading.Thread(
            target=self._in_background, args=(job, self._checkpoints.apart, stopped), daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save in flight, if any.

        Raises:
            Exception: what ended it; the same on every rank.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if (error := self._error) is not None:
            self._error = None
            raise error

    def _in_background(self, job: _Job, world: World, stopped: float) -> None:
        try:
            self._write(job, world, stopped)
        except Exception as error:
            self._error = error

    def _write(self, job: _Job, world: World, stopped: float | None) -> None:
        size = self._checkpoints.write(job.name, job.mine, job.state, self._require, world)
        seconds = time.perf_counter() - job.started
        kept = job.needed | self._kept
        self.newest, self._kept, self._saved = job.name, job.needed, time.monotonic()
        with alike(world):
            if world.rank == 0:
                self._checkpoints.keep_only(kept)
                if seconds > self._slowest:
                    self._slowest = 1.1 * seconds  # so that noise does not write the record at every save
                    self._run.update_record(checkpoint={"bytes": size, "seconds": round(seconds, 3)})
                job.then(seconds if stopped is None else stopped)
