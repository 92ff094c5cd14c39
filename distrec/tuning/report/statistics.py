"""The report's statistics of measured values: intervals over seeds, paired differences, parameter importance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

_ROUNDING = 1e-12  # smaller differences come from the order in which seeds were averaged, and count as 0
FEWEST_TRIALS = 4  # with fewer, a parameter's share of the variance says nothing


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (divisor n - 1) and 95 % t interval over fresh seeds.

    With one seed, `sd`, `low` and `high` are None.
    """
    array = np.asarray(values, np.float64)
    mean, seeds = float(array.mean()), len(array)
    if seeds < 2:
        return {"mean": mean, "sd": None, "low": None, "high": None, "seeds": seeds}
    sd = float(array.std(ddof=1))
    half = float(stats.t.ppf(0.975, seeds - 1)) * sd / seeds**0.5
    return {"mean": mean, "sd": sd, "low": mean - half, "high": mean + half, "seeds": seeds}


def mean_per_user(runs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """One metric of every user, averaged over runs.

    Args:
        runs: for each seed, the users `[users]` in ascending order and their values `[users]`.

    Returns:
        The users that all runs ranked, and their means.
    """
    users = runs[0][0]
    for other, _ in runs[1:]:
        users = np.intersect1d(users, other)
    return users, np.mean([values[np.isin(ranked, users)] for ranked, values in runs], axis=0)


def paired_difference(
    mine: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any] | None:
    """Mean of `mine` minus `other` over common users, with a 95 % t interval and the p of a two-sided paired t-test.

    Args:
        mine: users `[users]` in ascending order, and their values `[users]`.
        other: the same for the method to compare with.

    Returns:
        `mean`, `low`, `high`, `p`, `users`; None if fewer than two users are in both.
    """
    users, left, right = np.intersect1d(mine[0], other[0], assume_unique=True, return_indices=True)
    if len(users) < 2:
        return None
    gap = mine[1][left] - other[1][right]
    gap[abs(gap) < _ROUNDING] = 0
    mean, error = float(gap.mean()), float(gap.std(ddof=1)) / len(gap) ** 0.5
    half = float(stats.t.ppf(0.975, len(gap) - 1)) * error
    p = 1.0 if mean == 0 else 0.0  # for an error of 0: all users differ by the same amount
    if error > 0:
        p = float(2 * stats.t.sf(abs(mean) / error, len(gap) - 1))
    return {"mean": mean, "low": mean - half, "high": mean + half, "p": p, "users": len(users)}


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """The p values, by name, corrected for their number by Holm's step-down procedure (Holm 1979)."""
    out: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(p, key=lambda name: p[name])):
        largest = max(largest, min(1.0, p[name] * (len(p) - place)))
        out[name] = largest
    return out


def importance(values: Sequence[Mapping[str, Any]], scores: Sequence[float]) -> list[dict[str, Any]]:
    """The share of the variance of `scores` that each varied parameter alone explains, largest first.

    For numbers from a range, which hardly repeat, the share is the squared rank correlation (Spearman). For choices it
    is the correlation ratio eta^2: the variance between the means of the choices, divided by the total variance.

    With few trials, a share is above 0 even for a parameter without any effect. `chance` is its mean in that case:
    1 / (n - 1) for ranks, (choices - 1) / (n - 1) for choices.

    Args:
        values: the parameters of each finished trial.
        scores: the best validation value of each finished trial.

    Returns:
        `parameter`, `share`, `chance`, `kind` ("range" or "choices") and `trials`; empty with fewer than
        `FEWEST_TRIALS` trials or equal scores. A parameter that some trials lack is judged by the trials that have it.
    """
    out = []
    for name in sorted({name for trial in values for name in trial}):
        having = [(trial[name], score) for trial, score in zip(values, scores) if name in trial]
        y = np.array([score for _, score in having])
        keys = [json.dumps(value, sort_keys=True) for value, _ in having]
        distinct = len(set(keys))
        if len(y) < FEWEST_TRIALS or distinct < 2 or np.ptp(y) == 0:
            continue
        if all(is_number(value) for value, _ in having) and distinct > len(y) / 2:
            rank = stats.spearmanr(np.array([value for value, _ in having], np.float64), y).statistic
            share, chance, kind = float(rank) ** 2, 1 / (len(y) - 1), "range"
        elif distinct < len(y):
            share, chance, kind = _correlation_ratio(keys, y), (distinct - 1) / (len(y) - 1), "choices"
        else:
            continue  # every trial has a different choice, which would seem to explain everything
        out.append({"parameter": name, "share": share, "chance": chance, "kind": kind, "trials": len(y)})
    return sorted(out, key=lambda row: -row["share"])


def is_number(value: Any) -> bool:
    """Whether a parameter's value is a number (and not a bool)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _correlation_ratio(keys: Sequence[str], y: np.ndarray) -> float:
    groups = [y[[key == choice for key in keys]] for choice in sorted(set(keys))]
    between = sum(len(group) * (group.mean() - y.mean()) ** 2 for group in groups)
    return float(between / ((y - y.mean()) ** 2).sum())
