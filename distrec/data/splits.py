"""Rules that divide interactions into train, valid and test.

* `given`: a column of the source says the split.
* `per_user_time`: in time order, the last rows of each user are test and those before them valid. Users with fewer than
  10 rows give 1 row to valid and 1 to test. For users with n >= 10 rows, h = n // 5 are held out: h // 2 are valid, the
  others test.
* `per_user_random`: the same counts, in an order drawn from the seed that does not depend on the source's order.
* `leave_last_out`: the last row of each user is test, the one before it valid.
* `by_user`: users go to train, in an order drawn from the seed, until it has 80 % of the rows, then to valid until it
  has 10 %; the other users go to test. Of a valid or test user with n rows, the first floor(0.8 n) in time order are
  context: rankings may read them, training must not. The others are held out (docs/methods/bivrec.md section 2).
* `global_time`: the same two points in time for all users. Rows with equal times are in the same split. Valid and test
  rows of users who have no row before the first point are left out.

In time order, rows with equal times are in the order of the source.

If the rule counts rows per user, users with fewer than 3 rows keep all of them in train.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from pydantic import Field

from distrec.config import Section
from distrec.data import keyed
from distrec.errors import InputError

TRAIN, VALID, TEST, CONTEXT, LEFT_OUT = 0, 1, 2, 3, -1
# From users' numbers of rows to their numbers of validation and of test rows.
_Counts = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class SplitSection(Section):
    """`split:` of a data config."""

    name: Literal["given", "per_user_random", "per_user_time", "leave_last_out", "by_user", "global_time"] = Field(
        description="split rule: given (a column), per_user_random, per_user_time, leave_last_out, by_user or "
        "global_time",
    )
    valid: float | None = Field(
        None, gt=0, lt=1, description="share of interactions in valid, for global_time only; null: 0.1"
    )
    test: float | None = Field(
        None, gt=0, lt=1, description="share of interactions in test, for global_time only; null: 0.1"
    )


def assign(
    split: SplitSection,
    user: np.ndarray,
    item: np.ndarray,
    time: np.ndarray | None,
    label: np.ndarray | None,
    seed: int,
) -> np.ndarray:
    """Assign a split to every row.

    Args:
        split: The rule.
        user: `[rows]` codes in ascending order of the original ids; the rows are in the order of the source.
        item: `[rows]` codes in ascending order of the original ids.
        time: `[rows]`, or None if the source has no times.
        label: `[rows]` labels of a given split, or None.
        seed: Seed of `per_user_random` and `by_user`.

    Returns:
        `[rows]` int8: TRAIN, VALID, TEST, CONTEXT or LEFT_OUT.

    Raises:
        InputError: the rule needs times or labels that the source lacks, or its shares leave no train rows.
    """
    if split.name != "global_time" and (split.valid is not None or split.test is not None):
        raise InputError(f"keys 'split.valid' and 'split.test' do not apply to split '{split.name}'; remove them.")
    if split.name == "given":
        if label is None:
            raise InputError(
                "key 'split.name' is 'given' but the source has no split column; map one or choose a rule."
            )
        return label
    if split.name == "per_user_random":
        draw = np.empty(len(user))
        draw[np.lexsort((item, user))] = keyed.uniform(("split", seed), 0, len(user))
        return _per_user(user, draw, _benchmark_counts)
    if time is None:
        raise InputError(f"key 'split.name' is '{split.name}' but the source has no timestamp column; map one.")
    if split.name == "per_user_time":
        return _per_user(user, time, _benchmark_counts)
    if split.name == "leave_last_out":
        return _per_user(user, time, _leave_last_out_counts)
    if split.name == "by_user":
        return _by_user(user, time, seed)
    return _global_time(
        user, time, 0.1 if split.valid is None else split.valid, 0.1 if split.test is None else split.test
    )


def users_unknown(user: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Codes of users who have held-out rows but no rows in train or context, ascending."""
    count = int(user.max()) + 1
    held_out, known = np.zeros(count, bool), np.zeros(count, bool)
    held_out[user[(label == VALID) | (label == TEST)]] = True
    known[user[(label == TRAIN) | (label == CONTEXT)]] = True
    return np.flatnonzero(held_out & ~known)


def _benchmark_counts(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of valid and test rows of users with `rows` rows: 1 and 1 below 10, else h // 2 and h - h // 2."""
    held = rows // 5
    few = rows < 10
    return np.where(few, 1, held // 2), np.where(few, 1, held - held // 2)


def _leave_last_out_counts(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.ones_like(rows), np.ones_like(rows)


def _per_user(user: np.ndarray, key: np.ndarray, counts: _Counts) -> np.ndarray:
    """Label each row by its place among its user's rows, sorted by `key`; equal keys stay in the order of the rows."""
    order = np.lexsort((key, user))
    rows = np.bincount(user)
    valid, test = counts(rows)
    valid, test = np.where(rows < 3, 0, valid), np.where(rows < 3, 0, test)
    owner = user[order]
    from_end = np.cumsum(rows)[owner] - 1 - np.arange(len(user))
    label = np.empty(len(user), np.int8)
    label[order] = np.where(from_end < test[owner], TEST, np.where(from_end < (valid + test)[owner], VALID, TRAIN))
    return label


def _by_user(user: np.ndarray, time: np.ndarray, seed: int) -> np.ndarray:
    rows = np.bincount(user)
    dealt = np.argsort(keyed.uniform(("split by user", seed), 0, len(rows)), kind="stable")
    before = np.empty(len(rows), np.int64)  # rows of the users drawn before each user
    before[dealt] = np.cumsum(rows[dealt]) - rows[dealt]
    group = np.digitize(before / len(user), [0.8, 0.9])
    group[rows < 3] = TRAIN
    known = rows * 8 // 10
    in_time = _per_user(user, time, lambda count: (count - known, np.zeros_like(count)))
    return np.where(group[user] == TRAIN, TRAIN, np.where(in_time == TRAIN, CONTEXT, group[user])).astype(np.int8)


def _global_time(user: np.ndarray, time: np.ndarray, valid: float, test: float) -> np.ndarray:
    if valid + test >= 1:
        raise InputError(
            f"keys 'split.valid' and 'split.test' are {valid} and {test}, which leaves no train rows; lower them."
        )
    in_order = np.sort(time)
    to_valid, to_test = (in_order[int(len(time) * share)] for share in (1 - valid - test, 1 - test))
    label = np.where(time >= to_test, TEST, np.where(time >= to_valid, VALID, TRAIN)).astype(np.int8)
    unknown = np.zeros(int(user.max()) + 1, bool)
    unknown[users_unknown(user, label)] = True
    label[unknown[user] & (label > TRAIN)] = LEFT_OUT
    return label
