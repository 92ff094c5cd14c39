"""Filters of interactions: duplicates and k-core. Users and items are integer codes from 0."""

from __future__ import annotations

from typing import Literal

import numpy as np

Duplicates = Literal["first", "last", "refuse"]


def one_of_each_pair(user: np.ndarray, item: np.ndarray, time: np.ndarray | None, rule: Duplicates) -> np.ndarray:
    """Mark the rows to keep so that no user-item pair occurs twice.

    Args:
        user: `[rows]` codes.
        item: `[rows]` codes.
        time: `[rows]`, or None. The order of the rows decides between equal times, and if there are no times.
        rule: `first` keeps a pair's earliest row, `last` its latest. `refuse` does the same as `first`, and the caller
            raises the error.

    Returns:
        `[rows]` bool.
    """
    keep = np.ones(len(user), bool)
    if not len(user):
        return keep
    pair = user.astype(np.int64) * (int(item.max()) + 1) + item
    order = np.argsort(pair, kind="stable") if time is None else np.lexsort((time, pair))
    same = pair[order[1:]] == pair[order[:-1]]
    keep[order[:-1][same] if rule == "last" else order[1:][same]] = False
    return keep


def k_core(user: np.ndarray, item: np.ndarray, users: int, items: int) -> np.ndarray:
    """Mark the rows that remain after users with fewer than `users` rows and items with fewer than `items` are removed.

    Removal is repeated until nothing changes.

    Returns:
        `[rows]` bool.
    """
    keep = np.ones(len(user), bool)
    while True:
        of_user = np.bincount(user[keep], minlength=1)
        of_item = np.bincount(item[keep], minlength=1)
        rows = np.flatnonzero(keep)
        enough = (of_user[user[rows]] >= users) & (of_item[item[rows]] >= items)
        if enough.all():
            return keep
        keep[rows[~enough]] = False
