"""How a run's training ended: the fields, and what is said about them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from distrec.evaluation.ending import ENDING, ending, ending_words


def trained(values: list[float], every: int, patience: int, most: int) -> dict[str, Any]:
    """The ending of a run whose validation value after epoch e is `values[e - 1]`, written out literally."""
    history: list[dict[str, Any]] = []
    best, best_epoch, since = -1.0, None, 0
    for epoch, value in enumerate(values[:most], 1):
        history.append({"epoch": epoch})
        if epoch % every == 0 or epoch == most:
            history[-1]["valid"] = {"recall@20": value}
            best, best_epoch, since = (value, epoch, 0) if value > best else (best, best_epoch, since + 1)
            if since >= patience:
                break
    return ending(history, best_epoch, since, most)


@pytest.mark.parametrize("seed", range(40))
def test_an_ending_is_that_of_the_curve(seed: int) -> None:
    rng = np.random.default_rng(seed)
    most, every, patience = int(rng.integers(1, 30)), int(rng.integers(1, 5)), int(rng.integers(1, 6))
    values = rng.random(most).round(1).tolist()
    found = trained(values, every, patience, most)
    seen = [epoch for epoch in range(1, found["epochs"] + 1) if epoch % every == 0 or epoch == most]
    assert tuple(found) == ENDING
    assert found["best_epoch"] == max(seen, key=lambda epoch: (values[epoch - 1], -epoch))
    assert found["evaluations_since_best"] == sum(epoch > found["best_epoch"] for epoch in seen)
    assert found["best_is_last"] == (found["best_epoch"] == seen[-1])
    assert found["end"] == ("epochs" if found["epochs"] == most else "patience")
    told = ending_words(found)
    assert told.startswith(f"best epoch {found['best_epoch']} of {found['epochs']}")
    assert ("raise 'train.epochs'" in told) == found["best_is_last"]
    assert (f"'train.patience' after {patience} evaluation" in told) == (found["end"] == "patience")


@pytest.mark.parametrize(
    ("values", "every", "patience", "most", "expected"),
    [
        ([1, 2, 3], 1, 5, 3, "best epoch 3 of 3: still improving at the last evaluation; raise 'train.epochs'"),
        ([1, 2, 3, 4, 5], 2, 5, 5, "best epoch 5 of 5: still improving at the last evaluation; raise 'train.epochs'"),
        ([1, 2, 3, 4, 5], 4, 5, 6, "best epoch 4 of 5: still improving at the last evaluation; raise 'train.epochs'"),
        ([1, 2, 2], 1, 5, 3, "best epoch 2 of 3"),
        ([2, 1, 1], 1, 2, 9, "best epoch 1 of 3: stopped by 'train.patience' after 2 evaluations without improvement"),
        ([2, 1], 1, 1, 9, "best epoch 1 of 2: stopped by 'train.patience' after 1 evaluation without improvement"),
        ([], 1, 1, 0, "nothing to train"),
    ],
)
def test_an_ending_in_words(values: list[float], every: int, patience: int, most: int, expected: str) -> None:
    assert ending_words(trained(values, every, patience, most)) == expected
