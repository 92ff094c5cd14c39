"""Users' histories: the items of each user in time order, across splits, read as windows of a fixed length.

The splits of a prepared dataset are sorted by user, then time, then order in the source, so a history is a stretch of
the joined rows; equal times keep their order, those of an earlier split first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distrec.data.dataset import Interactions

PADDING = -1


class Histories:
    """What every user has had.

    Args:
        splits: interactions to join, in the order that breaks ties of time.
        users: number of users.
    """

    def __init__(self, splits: Sequence[Interactions], users: int):
        user = np.concatenate([rows.user for rows in splits])
        self._items = np.concatenate([rows.item for rows in splits])
        if len(splits) > 1:
            time = np.concatenate([rows.timestamp for rows in splits])
            self._items = self._items[np.lexsort((time, user))]
        self.lengths = np.bincount(user, minlength=users)
        self._ends = np.cumsum(self.lengths)

    @property
    def predictable(self) -> np.ndarray:
        """Users with an item that comes after another, ascending: those that next-item prediction can train on."""
        return np.flatnonzero(self.lengths >= 2)

    def newest(self, users: np.ndarray, length: int) -> np.ndarray:
        """The last `length` items of `users`: int64 `[users, length]`, the newest last, `PADDING` before the first."""
        return self.up_to(users, self.lengths[users], length)

    def up_to(self, users: np.ndarray, stop: np.ndarray, length: int) -> np.ndarray:
        """The `length` items before position `stop` `[users]` of each history, as `newest` gives them."""
        back = np.arange(length, 0, -1)  # how far before `stop` each column lies
        start = self._ends[users] - self.lengths[users]
        place = (start + stop)[:, None] - back
        there = back <= stop[:, None]
        if not len(self._items):
            return np.full(place.shape, PADDING, np.int64)
        return np.where(there, self._items[np.where(there, place, 0)], PADDING).astype(np.int64)
