"""Distinct user-item keys, look-ups among them, and the checks of times: NumPy's functions against `distrec`'s.

    python benchmarks/distinct.py [--rows 20000000] [--users 2000000] [--items 500000]

Rows are sorted by user and have random items, as in a dataset. A seventh of the distinct keys plays the held-out rows.
Each pair of functions runs once, one after the other, and their results are compared bit by bit.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from distrec.data.dataset import Interactions
from distrec.data.histories import among_equal_times, backward
from distrec.data.ordered import contains, distinct, starts


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("rows", 20_000_000), ("users", 2_000_000), ("items", 500_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    user = np.sort(rng.integers(0, arguments.users, arguments.rows, np.int32))
    item = rng.integers(0, arguments.items, arguments.rows, np.int32)
    keys = user.astype(np.int64) * arguments.items + item
    pairs = distinct(keys)
    owner, held_out = pairs // arguments.items, pairs[::7]
    print(f"numpy {np.__version__}, {arguments.rows:,} rows, {len(pairs):,} distinct keys")
    work: dict[str, tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]] = {
        "distinct keys": (lambda: np.unique(keys), lambda: distinct(keys)),
        "distinct keys, shuffled rows": (lambda: np.unique(shuffled), lambda: distinct(shuffled)),
        "distinct items": (lambda: np.unique(item), lambda: distinct(item)),
        "first key of each user": (lambda: np.unique(owner, return_index=True)[1], lambda: starts(owner)),
        "held-out keys among all": (
            lambda: np.isin(held_out, pairs, assume_unique=True),
            lambda: contains(pairs, held_out),
        ),
    }
    shuffled = rng.permutation(keys)
    for name, (theirs, ours) in work.items():
        (before, wanted), (after, found) = seconds(theirs), seconds(ours)
        assert found.dtype == wanted.dtype
        assert np.array_equal(found, wanted)
        print(f"{name}: numpy {before:.2f} s, distrec {after:.2f} s, ratio {before / after:.1f}", flush=True)

    stamp = rng.integers(0, 10**9, arguments.rows)
    stamp = stamp[np.lexsort((stamp, user))]  # in time order within each user
    last = np.append(user[1:] != user[:-1], True)
    splits = {
        name: Interactions(user[rows], item[rows], stamp[rows]) for name, rows in (("train", ~last), ("test", last))
    }
    checks: dict[str, Callable[[], Any]] = {
        "rows older than their history": lambda: backward(splits, arguments.users).older,
        "rows among equal times": lambda: among_equal_times(splits),
    }
    for name, check in checks.items():
        taken, found = seconds(check)
        print(f"{name}: {found:,} found in {taken:.2f} s")


if __name__ == "__main__":
    main()
