"""Checks of the place where runs are stored."""

from __future__ import annotations

import os
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from distrec.config.paths import PATH_WIDTH, located
from distrec.data.storage import Folder, open_folder
from distrec.doctor.finding import Finding, failed, not_applicable, passed, refused, size
from distrec.errors import InputError, StorageFull, shown
from distrec.submission.cluster import NoAnswer, within

_ANSWER = 9.0  # seconds; an object store that does not answer is otherwise asked for two minutes
_SKEW = 60.0  # seconds by which clocks may differ; object stores refuse requests from 15 minutes on
_LEAST_FREE = 1 << 30  # bytes on the disk of runs


@dataclass(frozen=True)
class Probe:
    """A file that was written, read and deleted, or why it could not.

    Attributes:
        place: the storage.
        seconds: what that took.
        skew: seconds by which the storage's clock is ahead of ours; negative: behind.
        error: what went wrong.
    """

    place: str
    seconds: float = 0.0
    skew: float = 0.0
    error: InputError | None = None


def probe(path: str, limit: float = _ANSWER) -> Probe:
    """Write, read and delete a small file in a folder, which is left as it was.

    Args:
        path: a folder, which need not exist, or an `s3://` prefix.
        limit: the seconds to wait for an answer.

    Raises:
        InputError: the path is none.
    """
    place = shown(located(path, "storage"), PATH_WIDTH)
    try:
        return within(limit, lambda: _probe(path, place))
    except NoAnswer as error:
        trouble = InputError(
            f"{place}: {error}; see whether it is up, and whether AWS_ENDPOINT_URL and the network lead there"
        )
    except InputError as error:
        trouble = error
    except Exception as error:  # an object store's client has many
        told = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason, semicolon, remedy = told.rpartition("; ")  # an object store's have their remedy
        if not semicolon:
            reason, remedy = told, "give a folder that can be written"
        trouble = InputError(f"{place} cannot be written ({reason}); {remedy}")
    return Probe(place, error=trouble)


def _probe(path: str, place: str) -> Probe:
    folder, name, content = open_folder(path), f".distrec-doctor-{uuid.uuid4().hex}", os.urandom(1024)
    if (file := folder.in_the_way()) is not None:
        raise InputError(f"'{file}' is a file, so {place} can be no folder; remove it, or give another path")
    missing = _missing(folder)
    began, before = time.perf_counter(), time.time()
    try:
        folder.write_bytes(content, name)
        after = time.time()
        same = folder.read_bytes(name) == content
        written = folder.fs.modified(folder.at(name)).timestamp()
        folder.remove(name)
        seconds = time.perf_counter() - began
    finally:
        with suppress(Exception):  # the error at hand says more
            folder.remove(name)
        for made in missing:
            with suppress(OSError):  # somebody else uses it now
                made.rmdir()
    if not same:
        raise InputError(f"{place} does not give back what was written to it; use another storage")
    return Probe(place, seconds, skew(before, after, written))


def _missing(folder: Folder) -> list[Path]:
    """The folders that a write would create on a local disk, the innermost first."""
    path, found = Path(folder.path), []
    while folder.local and not path.exists():
        found.append(path)
        path = path.parent
    return found


def skew(before: float, after: float, there: float, step: float = 1.0) -> float:
    """Seconds by which another clock is certainly ahead of ours (negative: behind) that showed `there` in between.

    Args:
        before, after: our time before and after, in seconds since the epoch.
        there: the other clock's time, rounded down to a whole `step`.
        step: in seconds.
    """
    if there + step < before:
        return there + step - before
    return max(there - after, 0.0)


def writable(found: Probe | None) -> Finding:
    """Whether a file can be written, read and deleted."""
    name = "storage"
    if found is None:
        return not_applicable(name, "none is named; give a config or --storage")
    if found.error is not None:
        remedy = "make room there" if isinstance(found.error, StorageFull) else "give another 'run.storage'"
        return refused(name, found.error, remedy)
    return passed(name, f"{found.place}: a file was written, read and deleted in {found.seconds:.2f} s")


def clock(found: Probe | None) -> Finding:
    """Whether the storage's clock and ours agree."""
    name = "storage's clock"
    if found is None or found.error is not None:
        return not_applicable(name, "nothing was written")
    return judged_clock(name, found.place, found.skew)


def judged_clock(name: str, whose: str, ahead: float) -> Finding:
    """Whether a clock that is `ahead` seconds ahead of ours agrees with it."""
    told = (
        "agrees with ours" if abs(ahead) < 1 else f"is {abs(ahead):,.0f} s {'ahead of' if ahead > 0 else 'behind'} ours"
    )
    if abs(ahead) > _SKEW:
        return failed(name, f"the clock of {whose} {told}", "let both hosts set their clocks by NTP")
    return passed(name, f"the clock of {whose} {told}")


def room(path: str | None, needed: int | None) -> Finding:
    """Whether a local disk has room for checkpoints.

    Args:
        path: the storage.
        needed: bytes of the checkpoints that a run keeps; None: not known.
    """
    name = "room for checkpoints"
    if path is None:
        return not_applicable(name, "no storage is named")
    folder = open_folder(path)
    if not folder.local:
        return not_applicable(name, "nothing is known about the room of an object store")
    free, least = folder.free_bytes(), _LEAST_FREE if needed is None else needed
    found = f"{size(free)} free" + ("" if needed is None else f", and the run's checkpoints take {size(needed)}")
    if free < least:
        return failed(name, found, "delete what is not needed there, or give a 'run.storage' on a larger disk")
    return passed(name, found)
