"""Users' histories: the items of each user in time order, across splits, read as windows of a fixed length.

The splits of a prepared dataset are sorted by user, then time, then order in the source. A user's history is therefore
a contiguous range of the joined rows. Rows with equal times keep their order, with an earlier split first. A split rule
that goes by time takes the rows with equal times in the order of the source too, so that histories over all splits are
in that order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distrec.data.dataset import Dataset, Interactions
from distrec.data.manifest import CONTEXT, SPLITS
from distrec.data.ordered import contains, distinct
from distrec.errors import InputError

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


@dataclass(frozen=True)
class Backward:
    """How many held-out rows are older than a row that the history for their split contains.

    Attributes:
        held_out: number of rows in valid and test.
        older: how many of them are older than the newest known row of their user. Known are train and context, and for
            test rows valid too. Equal times are not older.
        first: the first such row: its split, user, item and time, and the time of the newest known row.
    """

    held_out: int
    older: int
    first: tuple[str, int, int, int, int] | None


def backward(splits: Mapping[str, Interactions], users: int) -> Backward:
    """Count the held-out rows of `splits`, by name, that are older than their user's history; `users` is the number."""
    newest = np.full(users, np.iinfo(np.int64).min)
    held_out, older, first = 0, 0, None
    for name in ("train", CONTEXT, *SPLITS[1:]):
        if name not in splits:
            continue
        rows = splits[name]
        if name in SPLITS[1:]:
            late = np.flatnonzero(rows.timestamp < newest[rows.user])
            if len(late) and first is None:
                row = late[0]
                user, item = int(rows.user[row]), int(rows.item[row])
                first = name, user, item, int(rows.timestamp[row]), int(newest[user])
            held_out, older = held_out + len(rows), older + len(late)
        np.maximum.at(newest, rows.user, rows.timestamp)
    return Backward(held_out, older, first)


def among_equal_times(splits: Mapping[str, Interactions]) -> int:
    """How many held-out rows of `splits`, by name, have a row of the same user and time in another split."""
    keys = _moments(splits)
    tied = 0
    for name in SPLITS[1:]:
        if name in keys:
            others = [contains(keys[other], keys[name]) for other in keys if other != name]
            tied += int(np.logical_or.reduce(others).sum())
    return tied


def _moments(splits: Mapping[str, Interactions]) -> dict[str, np.ndarray]:
    """One number for the user and time of each row, int64 `[rows]` by split; ascending, as the rows are."""
    times = {name: rows.timestamp for name, rows in splits.items() if len(rows)}
    if not times:
        return {}
    low, high = min(int(time.min()) for time in times.values()), max(int(time.max()) for time in times.values())
    users = 1 + max(int(splits[name].user[-1]) for name in times)
    if (high - low + 1) * users < 2**63:
        span, times = high - low + 1, {name: time - low for name, time in times.items()}
    else:  # times such as nanoseconds over decades: number the times that occur
        seen = distinct(np.concatenate(list(times.values())))
        span, times = len(seen), {name: np.searchsorted(seen, time) for name, time in times.items()}
    return {name: splits[name].user.astype(np.int64) * span + time for name, time in times.items()}


def equal_times(tied: int, splits: Mapping[str, Interactions], rule: str) -> str:
    """In words: `tied` of the held-out rows of `splits`, which rule `rule` made, were chosen among equal times."""
    held_out = sum(len(splits[name]) for name in SPLITS[1:] if name in splits)
    by = {"given": "by their labels", "per_user_random": "at random"}.get(rule, "by the order of the source")
    return f"{tied:,} of {held_out:,} held-out rows were chosen among equal times, {by}"


def timeless(splits: Mapping[str, Interactions]) -> bool:
    """Whether all rows of `splits` have the same time, as where the source has no timestamps."""
    times = [rows.timestamp for rows in splits.values() if len(rows)]
    return not times or min(time.min() for time in times) == max(time.max() for time in times)


def require_time_order(data: Dataset, splits: Mapping[str, Interactions], method: str) -> None:
    """Check that histories hold nothing from after the held-out rows, for a method that reads histories.

    Args:
        data: the dataset.
        splits: all its interactions by name, context included.
        method: the method's name, for the error.

    Raises:
        InputError: a held-out row is older than the newest row of its history; or a random split divides rows with
            equal times, which have no order then.
    """
    found = backward(splits, data.users)
    why = (
        f"{method} reads histories, which would then hold rows from the future; prepare the data with 'split.name' "
        "leave_last_out, per_user_time or by_user, or use a method that reads no histories."
    )
    if found.first is not None:
        split, user, item, time, newest = found.first
        user_id, item_id = data.users_table()["original"][user], data.items_table()["original"][item]
        raise InputError(
            f"data '{data.folder}': {found.older:,} of {found.held_out:,} held-out rows are older than the newest "
            f"known row of their user (first: user {user_id}, item {item_id} in {split} at time {time}, newest known "
            f"row at {newest}), but {why}"
        )
    if data.manifest.split == "per_user_random" and (tied := among_equal_times(splits)):
        raise InputError(
            f"data '{data.folder}': split 'per_user_random' drew {tied:,} of {found.held_out:,} held-out rows among "
            f"equal times, but {why}"
        )
