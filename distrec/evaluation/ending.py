"""How a run's training ended: as fields of `summary.json`, and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ENDING = ("best_epoch", "epochs", "end", "best_is_last", "evaluations_since_best")


def ending(
    history: Sequence[Mapping[str, Any]], best_epoch: int | None, since_best: int, most_epochs: int
) -> dict[str, Any]:
    """The fields of `summary.json` about the length of training.

    Args:
        history: the records of the trained epochs; those that were evaluated have `valid`.
        best_epoch: the epoch with the best validation value; None if nothing was trained.
        since_best: the number of evaluations since then.
        most_epochs: the number of epochs after which training ends in any case.

    Returns:
        `best_epoch`; `epochs`, the number trained; `end`, "epochs" or "patience", None if nothing was trained;
        `best_is_last`, whether no evaluation followed the best one, so that training ended before its peak was seen;
        `evaluations_since_best`.
    """
    evaluated = [record["epoch"] for record in history if "valid" in record]
    end = "patience" if len(history) < most_epochs else "epochs"
    return {
        "best_epoch": best_epoch,
        "epochs": len(history),
        "end": None if best_epoch is None else end,
        "best_is_last": best_epoch is not None and best_epoch == evaluated[-1],
        "evaluations_since_best": since_best,
    }


def ending_words(about: Mapping[str, Any]) -> str:
    """One phrase: the best epoch, and whether longer training may give a better one.

    Args:
        about: a mapping with the fields that `ending` returns, such as a `summary.json`.
    """
    if about["best_epoch"] is None:
        return "nothing to train"
    best = f"best epoch {about['best_epoch']} of {about['epochs']}"
    if about["best_is_last"]:
        return f"{best}: still improving at the last evaluation; raise 'train.epochs'"
    if about["end"] == "patience":
        count = about["evaluations_since_best"]
        times = f"{count} {'evaluation' if count == 1 else 'evaluations'}"
        return f"{best}: stopped by 'train.patience' after {times} without improvement"
    return best
