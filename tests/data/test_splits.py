from __future__ import annotations

import numpy as np
import pytest

from distrec.data.filters import k_core, one_of_each_pair
from distrec.data.splits import CONTEXT, LEFT_OUT, TEST, TRAIN, VALID, SplitSection, assign
from distrec.errors import InputError


def rows(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users with 1 to 40 distinct items each and tied times, in random order."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 41, 60)
    user = np.repeat(np.arange(60), counts)
    item = np.concatenate([rng.permutation(80)[:n] for n in counts])
    time = rng.integers(0, 30, len(user))
    order = rng.permutation(len(user))
    return user[order], item[order], time[order]


def counts_by_rule(n: int) -> tuple[int, int]:
    if n < 3:
        return 0, 0
    if n < 10:
        return 1, 1
    held = int(0.2 * n)
    return held // 2, held - held // 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["per_user_time", "per_user_random", "leave_last_out"])
def test_per_user_rules_against_a_plain_loop(name: str, seed: int) -> None:
    user, item, time = rows(seed)
    label = assign(SplitSection(name=name), user, item, time, None, seed)
    for u in np.unique(user):
        mine = np.flatnonzero(user == u)
        valid, test = counts_by_rule(len(mine))
        if name == "leave_last_out" and len(mine) >= 3:
            valid, test = 1, 1
        assert (label[mine] == VALID).sum() == valid
        assert (label[mine] == TEST).sum() == test
        if name != "per_user_random":
            in_order = sorted(mine, key=lambda row: (time[row], row))
            expected = [TRAIN] * (len(mine) - valid - test) + [VALID] * valid + [TEST] * test
            assert label[in_order].tolist() == expected


@pytest.mark.parametrize("name", ["per_user_time", "per_user_random", "leave_last_out", "by_user", "global_time"])
def test_the_order_of_the_source_matters_only_among_equal_times(name: str) -> None:
    user, item, time = rows(7)
    if name not in ("per_user_random", "global_time"):
        time = np.random.default_rng(1).permutation(len(user))  # no equal times
    shuffle = np.random.default_rng(0).permutation(len(user))
    split = SplitSection(name=name)
    label = assign(split, user, item, time, None, 1)
    again = assign(split, user[shuffle], item[shuffle], time[shuffle], None, 1)
    assert np.array_equal(label[shuffle], again)


def test_the_seed_changes_the_random_split() -> None:
    user, item, _ = rows(1)
    split = SplitSection(name="per_user_random")
    one, two, again = (assign(split, user, item, None, None, seed) for seed in (1, 2, 1))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, two)


@pytest.mark.parametrize("seed", range(5))
def test_by_user_deals_out_whole_users_and_holds_out_the_last_fifth_of_some(seed: int) -> None:
    user, item, time = rows(seed)
    label = assign(SplitSection(name="by_user"), user, item, time, None, seed)
    shares = dict.fromkeys((TRAIN, VALID, TEST), 0)
    for u in np.unique(user):
        mine = np.flatnonzero(user == u)
        (group,) = set(label[mine].tolist()) - {CONTEXT}
        shares[group] += len(mine)
        if len(mine) < 3:
            assert group == TRAIN
        in_order = sorted(mine, key=lambda row: (time[row], row))
        known = len(mine) if group == TRAIN else int(0.8 * len(mine))
        before = TRAIN if group == TRAIN else CONTEXT
        assert label[in_order].tolist() == [before] * known + [group] * (len(mine) - known)
    largest = np.bincount(user).max()  # users are never divided, so a share is exact up to one user
    for group, share in ((TRAIN, 0.8), (VALID, 0.1), (TEST, 0.1)):
        assert abs(shares[group] - share * len(user)) <= largest
    other = assign(SplitSection(name="by_user"), user, item, time, None, seed + 1)
    assert not np.array_equal(label, other)


@pytest.mark.parametrize("seed", range(3))
def test_global_time_parts_no_moment_and_leaves_out_late_users(seed: int) -> None:
    user, item, time = rows(seed)
    time = time + np.where(user < 57, 0, 28)  # three users start late
    label = assign(SplitSection(name="global_time", valid=0.2, test=0.1), user, item, time, None, 1)
    trained = np.unique(user[label == TRAIN])
    assert time[label == TRAIN].max() < time[label == VALID].min()
    assert time[label == VALID].max() < time[label == TEST].min()
    assert (label == LEFT_OUT).any()
    assert not np.isin(user[label == LEFT_OUT], trained).any()
    assert np.isin(user[label > TRAIN], trained).all()


def test_shares_need_global_time_and_must_leave_train_rows() -> None:
    user, item, time = rows(0)
    with pytest.raises(InputError, match="do not apply to split 'per_user_time'"):
        assign(SplitSection(name="per_user_time", test=0.2), user, item, time, None, 1)
    with pytest.raises(InputError, match="leaves no train rows"):
        assign(SplitSection(name="global_time", valid=0.5, test=0.5), user, item, time, None, 1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", ["first", "last"])
@pytest.mark.parametrize("timed", [True, False])
def test_one_row_stays_of_each_pair(seed: int, rule: str, timed: bool) -> None:
    rng = np.random.default_rng(seed)
    user, item, time = rng.integers(0, 6, 200), rng.integers(0, 8, 200), rng.integers(0, 9, 200)
    keep = one_of_each_pair(user, item, time if timed else None, rule)
    best: dict[tuple[int, int], int] = {}
    for row in range(200):
        pair, when = (int(user[row]), int(item[row])), (int(time[row]) if timed else 0, row)
        old = best.get(pair)
        if old is None or (when < (int(time[old]) if timed else 0, old)) == (rule == "first"):
            best[pair] = row
    assert sorted(best.values()) == np.flatnonzero(keep).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_k_core_is_the_largest_stable_part(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = {(int(u), int(i)) for u, i in zip(rng.geometric(0.08, 300), rng.geometric(0.1, 300))}
    user, item = np.array(sorted(pairs)).T
    left = set(pairs)
    while True:
        doomed = {
            (u, i) for u, i in left if sum(v == u for v, _ in left) < 4 or sum(j == i for _, j in left) < 3
        }  # fmt: skip
        if not doomed:
            break
        left -= doomed
    keep = k_core(user, item, 4, 3)
    assert set(zip(user[keep].tolist(), item[keep].tolist())) == left
    assert k_core(user, item, 0, 0).all()
    assert not k_core(user, item, 1000, 0).any()
