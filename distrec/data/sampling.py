"""The global sample order and its negatives: what every step trains on, without reference to the number of workers.

Row `order[position]` of the training split is trained at `position` of the epoch; step `s` of global batch `B` covers
positions `s B` to `(s + 1) B`, the last step fewer. Order and negatives are keyed by (seed, epoch, position).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from distrec.data import keyed
from distrec.data.dataset import Interactions
from distrec.errors import InputError

_ATTEMPTS = 32


@dataclass(frozen=True)
class Triples:
    """One global batch: int64 arrays of equal length, and the training rows they come from."""

    users: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray
    rows: np.ndarray


class Sampler:
    """Batches of (user, positive, negative).

    Args:
        train: the training split.
        items: number of items.
        seed: of the run.
        negatives_from: draw negatives uniformly among the items that occur in training, or among all items. Never one
            of the user's training items; items held out for validation or test can be drawn.

    Raises:
        InputError: a user has every candidate item, so no negative exists.
    """

    def __init__(self, train: Interactions, items: int, seed: int, negatives_from: Literal["train", "all"]):
        self._user, self._item, self._items, self._seed = train.user, train.item, items, seed
        self._candidates = np.unique(train.item) if negatives_from == "train" else np.arange(items, dtype=np.int32)
        self._pairs = np.unique(train.user.astype(np.int64) * items + train.item)
        if len(self._pairs):
            users, counts = np.unique(self._pairs // items, return_counts=True)
            if counts.max() >= len(self._candidates):
                user = users[counts.argmax()]
                raise InputError(
                    f"user {user} has all {len(self._candidates)} candidate items in the training split, so no negative "
                    "can be drawn; remove that user or add items."
                )
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._user)

    def batch(self, epoch: int, step: int, global_batch: int) -> Triples:
        """The whole global batch of `step`."""
        if epoch != self._epoch:
            self._epoch, self._order = epoch, keyed.permutation(("order", self._seed, epoch), len(self))
        start = step * global_batch
        rows = self._order[start : start + global_batch]
        users = self._user[rows].astype(np.int64)
        return Triples(users, self._item[rows].astype(np.int64), self._negatives(epoch, start, users), rows)

    def _negatives(self, epoch: int, start: int, users: np.ndarray) -> np.ndarray:
        chosen = np.empty(len(users), np.int64)
        left = np.arange(len(users))
        for attempt in range(_ATTEMPTS):
            key = ("negatives", self._seed, epoch, attempt)
            draws = keyed.integers(key, start, len(users), len(self._candidates))[left]
            items = self._candidates[draws].astype(np.int64)
            taken = self._is_positive(users[left], items)
            chosen[left[~taken]] = items[~taken]
            left = left[taken]
            if not len(left):
                return chosen
        for place in left:  # users with nearly every item: choose among what is left, by the same keyed number
            own = self._pairs[
                slice(*np.searchsorted(self._pairs, [users[place] * self._items, (users[place] + 1) * self._items]))
            ]
            free = np.setdiff1d(self._candidates, own % self._items)
            draw = keyed.integers(("negatives", self._seed, epoch, _ATTEMPTS), start + int(place), 1, len(free))
            chosen[place] = free[draw[0]]
        return chosen

    def _is_positive(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        keys = users * self._items + items
        place = np.searchsorted(self._pairs, keys)
        return self._pairs[np.minimum(place, len(self._pairs) - 1)] == keys
