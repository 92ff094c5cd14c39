import numpy as np
import pytest

from distrec.data.dataset import Interactions
from distrec.data.histories import PADDING, Histories
from distrec.data.sampling import RandomWindows, UserWindows


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
