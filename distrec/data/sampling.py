"""The global sample order: what every step trains on, without reference to the number of workers.

An epoch is a list of samples; sample `order[position]` is trained at `position`, and step `s` of global batch `B`
covers positions `s B` to `(s + 1) B`, the last step fewer. Everything drawn is keyed by (seed, epoch, position).

Samples are of two kinds: interactions with a negative each (`PairSampler`), and windows of users' histories
(`UserWindows`, `RandomWindows`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np

from distrec.data import keyed
from distrec.data.dataset import Interactions
from distrec.data.histories import Histories
from distrec.errors import InputError
from distrec.parallel.partition import share

_ATTEMPTS = 32


@dataclass(frozen=True)
class Triples:
    """One global batch of pairs with a negative each: int64 `[B]`, and the training rows they come from."""

    users: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class Windows:
    """One global batch of stretches of histories.

    Attributes:
        users: int64 `[B]`.
        items: int64 `[B, L]`, the newest item last, -1 where a history is shorter.
        rows: which of the epoch's samples these are, for the ledger `[B]`.
    """

    users: np.ndarray
    items: np.ndarray
    rows: np.ndarray


Samples = Triples | Windows


def cut(samples: Samples, pieces: int) -> list[Samples]:
    """`samples` in order as at most `pieces` of nearly equal length, none of them empty."""
    bounds = [share(len(samples.users), piece, pieces) for piece in range(pieces)]
    columns = [field.name for field in fields(samples)]
    return [
        replace(samples, **{name: getattr(samples, name)[low:high] for name in columns})
        for low, high in bounds
        if low < high
    ]


class Sampler(ABC):
    """Deals an epoch's samples.

    Args:
        samples: of an epoch.
        seed: of the run.
    """

    def __init__(self, samples: int, seed: int):
        self.samples, self.seed = samples, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.samples

    def batch(self, epoch: int, step: int, global_batch: int) -> Samples:
        """The whole global batch of `step`."""
        if epoch != self._epoch:
            self._epoch, self._order = epoch, keyed.permutation(("order", self.seed, epoch), self.samples)
        start = step * global_batch
        return self._samples(epoch, start, self._order[start : start + global_batch])

    @abstractmethod
    def _samples(self, epoch: int, start: int, rows: np.ndarray) -> Samples:
        """Samples `rows` `[B]`, which stand at position `start` of the epoch and after."""


class PairSampler(Sampler):
    """Batches of (user, positive, negative): each row of the training split once an epoch.

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
        super().__init__(len(train), seed)
        self._user, self._item, self._items = train.user, train.item, items
        self._candidates = np.unique(train.item) if negatives_from == "train" else np.arange(items, dtype=np.int32)
        self._pairs = np.unique(train.user.astype(np.int64) * items + train.item)
        if len(self._pairs):
            users, counts = np.unique(self._pairs // items, return_counts=True)
            if counts.max() >= len(self._candidates):
                user = users[counts.argmax()]
                raise InputError(
                    f"user {user} has all {len(self._candidates)} candidate items in the training split, so no "
                    "negative can be drawn; remove that user or add items."
                )

    def _samples(self, epoch: int, start: int, rows: np.ndarray) -> Triples:
        users = self._user[rows].astype(np.int64)
        return Triples(users, self._item[rows].astype(np.int64), self._negatives(epoch, start, users), rows)

    def _negatives(self, epoch: int, start: int, users: np.ndarray) -> np.ndarray:
        chosen = np.empty(len(users), np.int64)
        left = np.arange(len(users))
        for attempt in range(_ATTEMPTS):
            key = ("negatives", self.seed, epoch, attempt)
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
            draw = keyed.integers(("negatives", self.seed, epoch, _ATTEMPTS), start + int(place), 1, len(free))
            chosen[place] = free[draw[0]]
        return chosen

    def _is_positive(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        keys = users * self._items + items
        place = np.searchsorted(self._pairs, keys)
        return self._pairs[np.minimum(place, len(self._pairs) - 1)] == keys


class UserWindows(Sampler):
    """The newest `length` items of each user's history: each user with at least two items once an epoch."""

    def __init__(self, histories: Histories, length: int, seed: int):
        self._histories, self._length = histories, length
        self._users = histories.predictable
        super().__init__(len(self._users), seed)

    def _samples(self, epoch: int, start: int, rows: np.ndarray) -> Windows:
        users = self._users[rows]
        return Windows(users, self._histories.newest(users, self._length), rows)


class RandomWindows(Sampler):
    """Windows that end in a random item: a user, then one of its positions from number `first` on, both uniformly.

    Drawn with replacement (docs/methods/bivrec.md section 2), so what is counted once an epoch is the draw. An epoch
    has as many draws as there are such positions.
    """

    def __init__(self, histories: Histories, length: int, first: int, seed: int):
        self._histories, self._length, self._first = histories, length, first
        self._users = np.flatnonzero(histories.lengths > first)
        super().__init__(int((histories.lengths[self._users] - first).sum()), seed)

    def _samples(self, epoch: int, start: int, rows: np.ndarray) -> Windows:
        draw = keyed.uniform(("windows", self.seed, epoch), 2 * start, 2 * len(rows)).reshape(-1, 2)
        users = self._users[(draw[:, 0] * len(self._users)).astype(np.int64)]
        positions = self._histories.lengths[users] - self._first
        at = self._first + (draw[:, 1] * positions).astype(np.int64)
        return Windows(users, self._histories.up_to(users, at + 1, self._length), rows)
