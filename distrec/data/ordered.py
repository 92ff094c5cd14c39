"""Distinct values and look-ups by sorting.

NumPy 2.3 and later finds distinct integers with a hash table, which takes many times as long as sorting where most
values are different (benchmarks/2026-11-25-distinct.md).
"""

from __future__ import annotations

import numpy as np


def distinct(values: np.ndarray) -> np.ndarray:
    """The distinct elements of `values`, ascending and of the same dtype, as `np.unique` returns them."""
    ascending = np.sort(values, axis=None)
    return ascending[starts(ascending)]


def starts(ascending: np.ndarray) -> np.ndarray:
    """The index of the first of each run of equal values, int64 `[runs]`; `ascending` has equal values side by side."""
    if not len(ascending):
        return np.empty(0, np.int64)
    return np.flatnonzero(np.append(True, ascending[1:] != ascending[:-1]))


def contains(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which of `values` are in `ascending`, bool `[values]`; fastest if `values` ascend too."""
    if not len(ascending):
        return np.zeros(len(values), bool)
    place = np.searchsorted(ascending, values)
    return ascending[np.minimum(place, len(ascending) - 1)] == values
