import numpy as np
import pytest

from distrec.data.dataset import Interactions
from distrec.data.histories import (
    PADDING,
    Backward,
    Histories,
    among_equal_times,
    backward,
    equal_times,
    timeless,
)
from distrec.data.sampling import RandomWindows, UserWindows
from distrec.data.splits import CONTEXT as SPLIT_CONTEXT
from distrec.data.splits import LEFT_OUT, TEST, TRAIN, VALID, SplitSection, assign


def split(rng: np.random.Generator, users: int, rows: int, times: int) -> Interactions:
    """Rows sorted by user and time, with many equal times and some users without rows."""
    user, time = rng.integers(0, users, rows), rng.integers(0, times, rows)
    order = np.lexsort((time, user))
    item = rng.integers(0, 50, rows)
    return Interactions(user[order].astype(np.int32), item.astype(np.int32), time[order].astype(np.int64))


def plainly(splits: list[Interactions], user: int) -> list[int]:
    """A user's items: the concatenated splits, stably sorted by time."""
    rows = [(int(t), int(i)) for s in splits for u, i, t in zip(s.user, s.item, s.timestamp, strict=True) if u == user]
    return [item for _, item in sorted(rows, key=lambda row: row[0])]


CASES = [(7, 40, 0), (30, 25, 1), (3, 90, 2), (5, 0, 3)]


@pytest.mark.parametrize(("users", "rows", "seed"), CASES)
@pytest.mark.parametrize("count", [1, 2])
def test_windows_are_the_ends_of_the_users_histories(users: int, rows: int, seed: int, count: int):
    rng = np.random.default_rng(seed)
    splits = [split(rng, users, rows, 6) for _ in range(count)]
    histories = Histories(splits, users)
    wanted = [plainly(splits, user) for user in range(users)]
    assert histories.lengths.tolist() == [len(items) for items in wanted]
    for length in (1, 4, 200):
        asked = rng.permutation(np.repeat(np.arange(users), 2))
        found = histories.newest(asked, length)
        for user, row in zip(asked, found, strict=True):
            items = wanted[user][-length:]
            assert row.tolist() == [PADDING] * (length - len(items)) + items
        stop = np.array([rng.integers(0, len(wanted[user]) + 1) for user in asked])
        for user, end, row in zip(asked, stop, histories.up_to(asked, stop, length), strict=True):
            items = wanted[user][:end][-length:]
            assert row.tolist() == [PADDING] * (length - len(items)) + items


def test_every_user_with_enough_items_is_trained_once_an_epoch():
    train = split(np.random.default_rng(4), 40, 120, 9)
    histories = Histories([train], 40)
    sampler = UserWindows(histories, 5, seed=3)
    batches = [sampler.batch(2, step, 7) for step in range(-(-len(sampler) // 7))]
    users = np.concatenate([batch.users for batch in batches])
    assert np.array_equal(np.sort(users), np.flatnonzero(histories.lengths >= 2))
    assert np.array_equal(np.sort(np.concatenate([batch.rows for batch in batches])), np.arange(len(sampler)))
    assert np.array_equal(np.concatenate([batch.items for batch in batches]), histories.newest(users, 5))
    assert not np.array_equal(users, sampler.batch(3, 0, len(sampler)).users)


def test_random_windows_end_in_any_late_position_and_do_not_depend_on_the_batch():
    train = split(np.random.default_rng(5), 12, 100, 50)
    histories, first = Histories([train], 12), 4
    sampler = RandomWindows(histories, 6, first, seed=1)
    long = np.flatnonzero(histories.lengths > first)
    assert len(sampler) == (histories.lengths[long] - first).sum()
    seen: set[tuple[int, ...]] = set()
    drawn = []
    for epoch in range(60):
        whole = sampler.batch(epoch, 0, len(sampler))
        parts = [sampler.batch(epoch, step, 5) for step in range(-(-len(sampler) // 5))]
        assert np.array_equal(np.concatenate([part.items for part in parts]), whole.items)
        drawn += whole.users.tolist()
        seen |= {(int(user), *row) for user, row in zip(whole.users, whole.items.tolist(), strict=True)}
    everyone = [(user, *histories.up_to(np.array([user]), np.array([stop + 1]), 6)[0].tolist())
                for user in long for stop in range(first, histories.lengths[user])]  # fmt: skip
    assert seen == set(everyone)
    counts = np.bincount(drawn, minlength=12)[long]
    assert counts.min() > 0.7 * counts.mean()  # users are drawn uniformly, however long their histories


def drawn_source(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """User, item and time of random rows without repeated pairs, in the order of a source; few to many equal times."""
    rng = np.random.default_rng(seed)
    users, items = int(rng.integers(1, 30)), int(rng.integers(3, 40))
    pair = rng.permutation(users * items)[: rng.integers(1, users * items + 1)]
    return pair // items, pair % items, rng.integers(0, rng.integers(1, 60), len(pair)).astype(np.int64)


def as_prepared(user: np.ndarray, item: np.ndarray, time: np.ndarray, label: np.ndarray) -> dict[str, Interactions]:
    """The splits of a source, as `prepare` writes them."""
    order = np.lexsort((time, user))
    splits = {}
    for code, name in ((TRAIN, "train"), (SPLIT_CONTEXT, "context"), (VALID, "valid"), (TEST, "test")):
        at = order[label[order] == code]
        splits[name] = Interactions(user[at].astype(np.int32), item[at].astype(np.int32), time[at])
    return splits


@pytest.mark.parametrize("rule", ["leave_last_out", "per_user_time", "by_user", "global_time"])
def test_histories_over_all_splits_are_in_the_order_of_the_source(rule: str) -> None:
    for seed in range(40):
        user, item, time = drawn_source(seed)
        label = assign(SplitSection(name=rule), user, item, time, None, seed)
        user, item, time, label = (column[label != LEFT_OUT] for column in (user, item, time, label))
        if not len(user):
            continue
        splits, users = as_prepared(user, item, time, label), int(user.max()) + 1
        histories = Histories([splits[name] for name in ("train", "context", "valid", "test")], users)
        for u in range(users):
            mine = sorted(np.flatnonzero(user == u), key=lambda row: (time[row], row))
            assert histories.newest(np.array([u]), max(len(mine), 1))[0].tolist() in (item[mine].tolist(), [PADDING])
        assert backward(splits, users) == Backward(int((label == VALID).sum() + (label == TEST).sum()), 0, None)


@pytest.mark.parametrize("seed", range(30))
def test_counts_of_backward_and_tied_rows_against_a_plain_loop(seed: int) -> None:
    user, item, time = drawn_source(seed)
    time = time * [1, 2**40, 2**57][seed % 3] - [0, 2**50, 2**62][seed % 3]  # as fine as nanoseconds, or finer
    label = np.random.default_rng(seed).choice([TRAIN, VALID, TEST, SPLIT_CONTEXT], len(user))
    splits, users = as_prepared(user, item, time, label), int(user.max()) + 1
    known = {VALID: (TRAIN, SPLIT_CONTEXT), TEST: (TRAIN, SPLIT_CONTEXT, VALID)}
    older, tied = [], 0
    for row in np.lexsort((np.arange(len(user)), time, user, label == TEST)):
        if label[row] in known:
            mine = (user == user[row]) & (np.arange(len(user)) != row)
            before = time[mine & np.isin(label, known[label[row]])]
            if len(before) and before.max() > time[row]:
                split = "valid" if label[row] == VALID else "test"
                older.append((split, int(user[row]), int(item[row]), int(time[row]), int(before.max())))
            tied += bool((mine & (time == time[row]) & (label != label[row])).any())
    held_out = int(np.isin(label, (VALID, TEST)).sum())
    found = backward(splits, users)
    assert found == Backward(held_out, len(older), older[0] if older else None)
    assert among_equal_times(splits) == tied
    assert equal_times(tied, splits, "by_user").startswith(f"{tied:,} of {held_out:,} held-out rows were chosen among")
    assert timeless(splits) == (len(set(time.tolist())) == 1)


def test_nothing_is_late_or_tied_without_rows() -> None:
    none = Interactions(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int64))
    splits = {"train": none, "valid": none, "test": none}
    assert backward(splits, 3) == Backward(0, 0, None)
    assert among_equal_times(splits) == 0
    assert timeless(splits)
