"""What the report computes from measured values: intervals over seeds, paired differences, parameter importance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

_ROUNDING = 1e-12  # of averages over seeds in another order: no difference
FEWEST_TRIALS = 4  # below, a parameter's share of the variance says nothing


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1) and 95 % t interval over fresh seeds.

    One seed has neither: `sd`, `low` and `high` are null.
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
        runs: of each seed the users, ascending `[users]`, and their values `[users]`.

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
    """Mean difference over the users of both, with a 95 % t interval and the p of a two-sided paired t-test.

    Args:
        mine: users, ascending `[users]`, and their values `[users]`.
        other: the same of what is compared with.

    Returns:
        `mean`, `low`, `high`, `p`, `users`; nothing where fewer than two users are in both.
    """
    users, left, right = np.intersect1d(mine[0], other[0], assume_unique=True, return_indices=True)
    if len(users) < 2:
        return None
    gap = mine[1][left] - other[1][right]
    gap[abs(gap) < _ROUNDING] = 0
    mean, error = float(gap.mean()), float(gap.std(ddof=1)) / len(gap) ** 0.5
    half = float(stats.t.ppf(0.975, len(gap) - 1)) * error
    p = 1.0 if mean == 0 else 0.0  # without spread: every user differs by the same amount, most likely by nothing
    if error > 0:
        p = float(2 * stats.t.sf(abs(mean) / error, len(gap) - 1))
    return {"mean": mean, "low": mean - half, "high": mean + half, "p": p, "users": len(users)}


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Values of p corrected for their number by Holm's step-down rule (1979)."""
    out: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(p, key=lambda name: p[name])):
        largest = max(largest, min(1.0, p[name] * (len(p) - place)))
        out[name] = largest
    return out


def importance(values: Sequence[Mapping[str, Any]], scores: Sequence[float]) -> list[dict[str, Any]]:
    """For each varied parameter the share of the variance of `scores` that it alone explains, largest first.

    For numbers that hardly repeat, drawn from a range, that is the squared rank correlation (Spearman). For choices it
    is the correlation ratio eta^2, the variance between the means of each choice over the whole variance.

    A share is never 0 with few trials. `chance` is its mean if the parameter did nothing: 1 / (n - 1) for ranks,
    (choices - 1) / (n - 1) for choices.

    Args:
        values: of each finished trial its parameters.
        scores: its best validation value.

    Returns:
        `parameter`, `share`, `chance`, `kind` ("range" or "choices") and `trials`; empty with fewer than
        `FEWEST_TRIALS` trials or equal scores. A parameter that some trials lack is judged among those that have it.
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
            continue  # every trial has a choice of its own: it would seem to explain everything
        out.append({"parameter": name, "share": share, "chance": chance, "kind": kind, "trials": len(y)})
    return sorted(out, key=lambda row: -row["share"])


def is_number(value: Any) -> bool:
    """Whether a parameter's value is a quantity."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _correlation_ratio(keys: Sequence[str], y: np.ndarray) -> float:
    groups = [y[[key == choice for key in keys]] for choice in sorted(set(keys))]
    between = sum(len(group) * (group.mean() - y.mean()) ** 2 for group in groups)
    return float(between / ((y - y.mean()) ** 2).sum())
