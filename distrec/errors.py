"""Errors that end a `distrec` command, and the exit status of each."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

DONE, FAILED, BAD_INPUT, NON_FINITE, INTERRUPTED = 0, 1, 2, 3, 130
CLOSED_PIPE = 141  # as if SIGPIPE had ended the process, which is what shells expect


class InputError(Exception):
    """The user's input is invalid. The message is one sentence: place, value, remedy. Exit status 2."""


class StorageError(InputError):
    """A path cannot be read or reached now: rights, a lost connection. Exit status 2; trying again may help."""


class StorageFull(InputError):
    """A disk or a quota has no room for a file. Exit status 2; trying again does not help."""


class NonFiniteLoss(Exception):
    """A loss term, the gradient, a weight or a score is NaN or infinite. Exit status 3.

    If a loss term or the gradient is, the step has changed no weight, except sparse tables, which the backward pass
    updates.
    """


class WorkersFailed(Exception):
    """Workers were lost, or failed, more often than the config allows. Exit status 1.

    Its cause is what a worker raised; None if all that is known is that workers were lost.
    """


class Interrupted(Exception):
    """Ctrl-C or SIGTERM arrived; the run saved a checkpoint and stopped. Exit status 130."""


def exit_status(error: BaseException) -> int:
    """The process exit status that `error` stands for."""
    if isinstance(error, InputError):
        return BAD_INPUT
    if isinstance(error, NonFiniteLoss):
        return NON_FINITE
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return INTERRUPTED
    return FAILED


def shown(value: object, width: int = 60, quoted: bool = True) -> str:
    """`value` for a message, cut to about `width` characters and in one line, so that the message stays one sentence.

    Args:
        value: any value.
        width: characters after which it is cut.
        quoted: write it as Python does, with quotation marks around a string; otherwise write its text alone, for a
            phrase or for a message that has marks of its own.
    """
    try:
        if not quoted:
            text = str(value)
            start = "".join(mark if mark.isprintable() else repr(mark)[1:-1] for mark in text[:width])
            return start + ("…" if len(text) > width else "")
        text = repr(value if not isinstance(value, str) else value[: width + 1])
    except ValueError:  # an integer with more digits than Python prints
        text = "a number of thousands of digits"
    return text if len(text) <= width + 2 else f"{text[:width]}…" + ("'" if isinstance(value, str) else "")


def first_few(words: Iterable[str], count: int, most: int = 3) -> str:
    """The first `most` of `count` words for a message, separated by commas, with "…" if there are more."""
    return ", ".join(islice(words, most)) + (", …" if count > most else "")
