"""What follows when the workers of a run have ended: pure decisions, which need no cluster.

`distrec.training.supervise` observes and acts; this module decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from distrec.errors import InputError, Interrupted, NonFiniteLoss, StorageError, WorkersFailed

Reason = Literal["stop", "resize", "preempted"]
"""Why workers were asked to save a checkpoint and end: the user stops the run, the cluster has room for more workers,
or hosts will be taken away."""

_ASKED = {"resize": "the cluster has room for more of them", "preempted": "hosts will be taken away"}

GROW_AFTER = 30.0  # seconds that workers have trained before more of them are considered: every start costs time
SILENT = {True: 15.0, False: 60.0}
"""Seconds without a heartbeat after which a worker that trains, or one that still starts, counts as frozen. While it
starts, a single call that reads or sorts much may keep its other threads waiting."""


@dataclass(frozen=True)
class End:
    """How the workers ended.

    Attributes:
        errors: what each worker raised or how it died, by rank; empty if all of them finished.
        what: what happened, as a phrase for the log.
        lost: whether the process of a worker died, or stood still.
        asked: why the workers had been asked to end; None if they had not been.
        taken: whether the hosts of lost workers had been announced to be taken away.
        progress: a number that grows with every finished epoch.
    """

    errors: Mapping[int, BaseException]
    what: str = ""
    lost: bool = False
    asked: Reason | None = None
    taken: bool = False
    progress: int = 0


@dataclass(frozen=True)
class Failures:
    """Failures since the last progress.

    Attributes:
        count: how many there were.
        progress: the progress at the last of them.
    """

    count: int = 0
    progress: int = -1

    def after(self, progress: int) -> Failures:
        """One failure more. An epoch that was finished since the last failure makes it the first again."""
        return Failures(self.count + 1 if progress == self.progress else 1, progress)


@dataclass(frozen=True)
class Decision:
    """What to do.

    Attributes:
        action: "finish"; start "again" from the newest checkpoint; or "raise" `error`.
        failures: the failures so far.
        why: what happened, as a line for the log; empty if there is nothing to say.
        error: what to raise.
    """

    action: Literal["finish", "again", "raise"]
    failures: Failures
    why: str = ""
    error: BaseException | None = None


def decide(end: End, failures: Failures, most: int) -> Decision:
    """What follows from how the workers ended.

    Args:
        end: how they ended.
        failures: the failures before.
        most: the largest number of failures without progress after which workers start again.
    """
    if not end.errors:
        return Decision("finish", failures)
    if (final := _final(end.errors)) is not None:
        return Decision("raise", failures, error=final)
    interrupted = [error for error in end.errors.values() if isinstance(error, Interrupted)]
    if interrupted:
        if end.asked in _ASKED:
            return Decision("again", failures, f"workers saved a checkpoint, because {_ASKED[end.asked]}")
        return Decision("raise", failures, error=interrupted[0])
    if end.taken or end.asked == "preempted":
        return Decision("again", failures, f"{end.what}; this was announced, so it does not count as a failure")
    failures = failures.after(end.progress)
    if failures.count > most:
        final = WorkersFailed(
            f"{end.what}; workers failed {failures.count} times without a finished epoch between, and "
            f"'train.max_failures' is {most}. The same command continues from the newest checkpoint."
        )
        final.__cause__ = _raised(end)
        return Decision("raise", failures, error=final)
    return Decision("again", failures, f"{end.what}; failure {failures.count} of {most} since the last finished epoch")


def may_grow(workers: int, most: int, room: int, trained: float) -> bool:
    """Whether workers that train should make place for more of them.

    Args:
        workers: how many there are.
        most: how many are wanted.
        room: for how many more the cluster has free CPUs.
        trained: seconds since these workers began to train.
    """
    return workers < most and room > 0 and trained >= GROW_AFTER


def frozen(silent: Mapping[int, float], trains: Mapping[int, bool]) -> list[int]:
    """The ranks of workers that stand still.

    Args:
        silent: seconds since the last heartbeat of each worker.
        trains: whether each of them has begun to train.
    """
    return sorted(rank for rank, seconds in silent.items() if seconds > SILENT[trains[rank]])


def _final(errors: Mapping[int, BaseException]) -> BaseException | None:
    """The error that a retry would meet again, if there is one."""
    for error in errors.values():
        if isinstance(error, InputError | NonFiniteLoss) and not isinstance(error, StorageError):
            return error
    return None


def _raised(end: End) -> BaseException | None:
    """What a worker raised, if no other one was lost: its traceback says more than the phrase."""
    return None if end.lost else next(iter(end.errors.values()))
