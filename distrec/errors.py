"""Errors that end a verb, and the exit status each one stands for."""

from __future__ import annotations

DONE, FAILED, BAD_INPUT, NON_FINITE, INTERRUPTED = 0, 1, 2, 3, 130


class InputError(Exception):
    """Something the user gave is wrong. One sentence: place, value, remedy. Exit status 2."""


class NonFiniteLoss(Exception):
    """A loss term or the gradient's norm became NaN or infinite before any weight was touched. Exit status 3."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the run saved a checkpoint and stopped. Exit status 130."""


def exit_status(error: BaseException) -> int:
    """The process exit status that `error` stands for."""
    if isinstance(error, InputError):
        return BAD_INPUT
    if isinstance(error, NonFiniteLoss):
        return NON_FINITE
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return INTERRUPTED
    return FAILED
