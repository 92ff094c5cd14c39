"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distrec.errors import InputError

State = Literal["passed", "failed", "not applicable"]


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        name: of the check.
        state: whether it passed, failed, or says nothing here.
        found: what was seen, or why the check says nothing here.
        remedy: what to do, if it failed.
    """

    name: str
    state: State
    found: str
    remedy: str | None = None


def passed(name: str, found: str) -> Finding:
    """A check that found nothing wrong."""
    return Finding(name, "passed", found)


def failed(name: str, found: str, remedy: str) -> Finding:
    """A check that found something wrong."""
    return Finding(name, "failed", found, remedy)


def not_applicable(name: str, why: str) -> Finding:
    """A check that says nothing here."""
    return Finding(name, "not applicable", why)


def refused(name: str, error: InputError, remedy: str) -> Finding:
    """A check that failed with an error, whose message usually ends with a remedy after a semicolon.

    Args:
        name: of the check.
        error: the error.
        remedy: that of a message without one.
    """
    found, semicolon, told = str(error).rstrip(".").rpartition("; ")
    return failed(name, found, told) if semicolon else failed(name, told, remedy)


def size(count: float) -> str:
    """Bytes for people, in the units of `ray start` and Kubernetes."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} bytes"
