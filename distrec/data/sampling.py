"""The global sample order: what each step trains on, whatever the number of workers.

An epoch is a permutation of the samples. Step `s` with global batch size `B` trains on those at positions `s B` to
`(s + 1) B`; the last step may have fewer. All random draws are keyed by seed, epoch and position.

There are three kinds of samples: interactions (`PairSampler`), interactions with one negative each (`TripleSampler`),
and windows of users' histories (`UserWindows`, `RandomWindows`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np

from distrec.data import keyed
from distrec.data.dataset import Interactions
from distrec.data.histories import Histories
from distrec.data.ordered import contains, distinct, starts
from distrec.errors import InputError
from distrec.parallel.partition import share

_ATTEMPTS = 32


@dataclass(frozen=True)
class Pairs:
    """One global batch of interactions, int64 `[B]`, and their training rows."""

    users: np.ndarray
    positives: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class Triples:
    """One global batch of pairs with one negative each, int64 `[B]`, and the training rows of the pairs."""

    users: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class Windows:
    """One global batch of windows of histories.

    Attributes:
        users: int64 `[B]`.
        items: int64 `[B, L]`, oldest item first, with -1 in front of shorter histories.
        rows: indices of the samples within the epoch, for the ledger, `[B]`.
    """

    users: np.ndarray
    items: np.ndarray
    rows: np.ndarray


Samples = Pairs | Triples | Windows


def cut(samples: Samples, pieces: int) -> list[Samples]:
    """Divide `samples`, in order, into at most `pieces` pieces of nearly equal length, none of them empty."""
    bounds = [share(len(samples.users), piece, pieces) for piece in range(pieces)]
    columns = [field.name for field in fields(samples)]
    return [
        replace(samples, **{name: getattr(samples, name)[low:high] for name in columns})
        for low, high in bounds
        if low < high
    ]


class Sampler(ABC):
    """Deals out the samples of an epoch, batch by batch.

    Args:
        samples: number of samples in an epoch.
        seed: the run's seed.
    """

    def __init__(self, samples: int, seed: int):
        self.samples, self.seed = samples, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.samples

    def batch(self, epoch: int, step: int, global_batch: int) -> Samples:
        """The global batch of `step`: the rows of all workers."""
        if epoch != self._epoch:
            self._epoch, self._order = epoch, keyed.permutation(("order", self.seed, epoch), self.samples)
        start = step * global_batch
        return self._samples(epoch, start, self._order[start : start + global_batch])

    @abstractmethod
    def _samples(self, epoch: int, start: int, rows: np.ndarray) -> Samples:
        """The samples with indices `rows` `[B]`, which are at positions `start` and following of the epoch."""


class PairSampler(Sampler):
    """Batches of (user, positive): each row of the training split once per epoch."""

    def __init__(self, train: Interactions, seed: int):
        super().__init__(len(train), seed)
        self._user, self._item = train.user, train.item

    def _samples(self, epoch: int, start: int, rows: np.ndarray) -> Pairs:
        return Pairs(self._user[rows].astype(np.int64), self._item[rows].astype(np.int64), rows)


class TripleSampler(Sampler):
    """Batches of (user, positive, negative): each row of the training split once per epoch.

    Args:
        train: the training split.
        items: number of items.
        seed: the run's seed.
        negatives_from: draw negatives uniformly from the items that occur in training, or from all items. A user's
            training items are never drawn for that user; items held out for validation or test can be.

    Raises:
        InputError: a user has every candidate item, so no negative exists.
    """

    def __init__(self, train: Interactions, items: int, seed: int, negatives_from: Literal["train", "all"]):
        super().__init__(len(train), seed)
        self._user, self._item, self._items = train.user, train.item, items
        self._candidates = distinct(train.item) if negatives_from == "train" else np.arange(items, dtype=np.int32)
        self._pairs = distinct(train.user.astype(np.int64) * items + train.item)
        if len(self._pairs):
            first = starts(self._pairs // items)  # of each user's pairs
            counts = np.diff(first, append=len(self._pairs))
            if counts.max() >= len(self._candidates):
                user = self._pairs[first[counts.argmax()]] // items
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
            taken = contains(self._pairs, users[left] * self._items + items)
            chosen[left[~taken]] = items[~taken]
            left = left[taken]
            if not len(left):
                return chosen
        for place in left:  # users who have nearly every item: draw from the remaining ones
            own = self._pairs[
                slice(*np.searchsorted(self._pairs, [users[place] * self._items, (users[place] + 1) * self._items]))
            ]
            free = np.setdiff1d(self._candidates, own % self._items, assume_unique=True)
            draw = keyed.integers(("negatives", self.seed, epoch, _ATTEMPTS), start + int(place), 1, len(free))
            chosen[place] = free[draw[0]]
        return chosen


class UserWindows(Sampler):
    """The newest `length` items of each history: once per epoch for each user with at least two items."""

    def __init__(self, histories: Histories, length: int, seed: int):
        self._histories, self._length = histories, length
        self._users = histories.predictable
        super().__init__(len(self._users), seed)

    def _samples(self, epoch: int, start: int, rows: np.ndarray) -> Windows:
        users = self._users[rows]
        return Windows(users, self._histories.newest(users, self._length), rows)


class RandomWindows(Sampler):
    """Windows that end at a random item: draw a user, then one of its positions from `first` on, both uniformly.

    Windows are drawn with replacement (docs/methods/bivrec.md section 2), so the ledger counts draws, not windows. An
    epoch has as many draws as there are such positions.
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
