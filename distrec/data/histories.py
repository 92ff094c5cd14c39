"""Users' histories: the items of each user in time order, across splits, read as windows of a fixed length.

The splits of a prepared dataset are sorted by user, then time, then order in the source. A user's history is therefore
a contiguous range of the joined rows. Rows with equal times keep their order, with an earlier split first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distrec.data.dataset import Interactions

PADDING = -1


class Histories:
    """The history of every user.

    Args:
        splits: interactions to join; among equal times, rows of an earlier split come first.
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
        """Users with at least two items, ascending: next-item prediction can train on these."""
        return np.flatnonzero(self.lengths >= 2)

    def newest(self, users: np.ndarray, length: int) -> np.ndarray:
        """The last `length` items of `users`, int64 `[users, length]`: oldest first, with `PADDING` in front."""
        return self.up_to(users, self.lengths[users], length)

    def up_to(self, users: np.ndarray, stop: np.ndarray, length: int) -> np.ndarray:
        """The `length` items before position `stop` `[users]` of each history, in the form that `newest` returns."""
        back = np.arange(length, 0, -1)  # distance of each column from `stop`
        start = self._ends[users] - self.lengths[users]
        place = (start + stop)[:, None] - back
        there = back <= stop[:, None]
        if not len(self._items):
            return np.full(place.shape, PADDING, np.int64)
        return np.where(there, self._items[np.where(there, place, 0)], PADDING).astype(np.int64)
