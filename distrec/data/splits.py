"""How interactions are divided into train, valid and test.

* `given`: by a column of the source.
* `per_user_time`: in time order, the last ones of each user are test, those before them valid; equal times in ascending
  order of the original item id. Of n rows, fewer than 10 give 1 + 1; otherwise h = n // 5 are held out, h // 2 valid.
* `per_user_random`: the same numbers, in an order drawn from the seed; independent of the order of the source.
* `leave_last_out`: the last row of each user is test, the one before it valid.
* `by_user`: users are dealt out in an order drawn from the seed until train has 80 % of rows and valid 10 %; test has
  the rest. Of a valid or test user with n rows the first floor(0.8 n) in time order are context, known when ranking and
  never trained; those after them are held out (docs/methods/bivrec.md section 2).
* `global_time`: two points in time for everybody; rows of one time never part. Valid and test rows of users who have no
  row before the first point are left out.

Where the rule counts per user, users with fewer than 3 rows keep them all in train.
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
_Counts = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # from a user's rows to its valid and test rows


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
    """The split of every row.

    Args:
        split: The rule.
        user: `[rows]` codes in ascending order of the original ids.
        item: `[rows]` codes in ascending order of the original ids.
        time: `[rows]`, or None where the source has none.
        label: `[rows]` labels of a given split, or None.
        seed: Names the draws of `per_user_random` and `by_user`.

    Returns:
        `[rows]` int8: TRAIN, VALID, TEST, CONTEXT or LEFT_OUT.

    Raises:
        InputError: the rule needs times or labels that the source does not give, or shares that leave nothing.
    """
    if split.name != "global_time" and (split.valid is not None or split.test is not None):
        raise InputError(f"keys 'split.valid' and 'split.test' mean nothing to split '{split.name}'; remove them.")
    if split.name == "given":
        if label is None:
            raise InputError(
                "key 'split.name' is 'given' but the source has no split column; map one or choose a rule."
            )
        return label
    if split.name == "per_user_random":
        draw = np.empty(len(user))
        draw[np.lexsort((item, user))] = keyed.uniform(("split", seed), 0, len(user))
        return _per_user(user, (item, draw), _benchmark_counts)
    if time is None:
        raise InputError(f"key 'split.name' is '{split.name}' but the source has no timestamp column; map one.")
    if split.name == "per_user_time":
        return _per_user(user, (item, time), _benchmark_counts)
    if split.name == "leave_last_out":
        return _per_user(user, (item, time), _leave_last_out_counts)
    if split.name == "by_user":
        return _by_user(user, item, time, seed)
    return _global_time(
        user, time, 0.1 if split.valid is None else split.valid, 0.1 if split.test is None else split.test
    )


def users_unknown(user: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Codes of the users who have held-out rows but none in train or context, ascending."""
    return np.setdiff1d(user[np.isin(label, (VALID, TEST))], user[np.isin(label, (TRAIN, CONTEXT))])


def _benchmark_counts(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Valid and test rows of users with `rows` rows: 1 + 1 below 10, else h = n // 5 as h // 2 and the rest."""
    held = rows // 5
    few = rows < 10
    return np.where(few, 1, held // 2), np.where(few, 1, held - held // 2)


def _leave_last_out_counts(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.ones_like(rows), np.ones_like(rows)


def _per_user(user: np.ndarray, keys: tuple[np.ndarray, ...], counts: _Counts) -> np.ndarray:
    """Labels from each row's place among its user's rows, sorted by `keys` (the last one first)."""
    order = np.lexsort((*keys, user))
    rows = np.bincount(user)
    valid, test = counts(rows)
    valid, test = np.where(rows < 3, 0, valid), np.where(rows < 3, 0, test)
    owner = user[order]
    from_end = np.cumsum(rows)[owner] - 1 - np.arange(len(user))
    label = np.empty(len(user), np.int8)
    label[order] = np.where(from_end < test[owner], TEST, np.where(from_end < (valid + test)[owner], VALID, TRAIN))
    return label


def _by_user(user: np.ndarray, item: np.ndarray, time: np.ndarray, seed: int) -> np.ndarray:
    rows = np.bincount(user)
    dealt = np.argsort(keyed.uniform(("split by user", seed), 0, len(rows)), kind="stable")
    before = np.empty(len(rows), np.int64)  # rows of the users dealt out before each
    before[dealt] = np.cumsum(rows[dealt]) - rows[dealt]
    group = np.digitize(before / len(user), [0.8, 0.9])
    group[rows < 3] = TRAIN
    known = rows * 8 // 10
    in_time = _per_user(user, (item, time), lambda count: (count - known, np.zeros_like(count)))
    return np.where(group[user] == TRAIN, TRAIN, np.where(in_time == TRAIN, CONTEXT, group[user])).astype(np.int8)


def _global_time(user: np.ndarray, time: np.ndarray, valid: float, test: float) -> np.ndarray:
    if valid + test >= 1:
        raise InputError(
            f"keys 'split.valid' and 'split.test' are {valid} and {test}, which leaves no train rows; lower them."
        )
    in_order = np.sort(time)
    to_valid, to_test = (in_order[int(len(time) * share)] for share in (1 - valid - test, 1 - test))
    label = np.where(time >= to_test, TEST, np.where(time >= to_valid, VALID, TRAIN)).astype(np.int8)
    label[np.isin(user, users_unknown(user, label)) & (label > TRAIN)] = LEFT_OUT
    return label
