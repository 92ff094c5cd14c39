import math

import numpy as np
import pytest

from distrec.evaluation import metrics
from tests.evaluation.cases import plain_metrics


def test_a_case_worked_by_hand():
    # User A: 2 held-out items at positions 2 and 4 (from 1); user B: 3 held-out items, one of them at position 1.
    values = metrics.per_user(np.array([3, 1, 9, 0, 9]), np.array([0, 2, 5]), (3, 9))
    log = math.log2
    assert values["recall@3"] == pytest.approx([1 / 2, 1 / 3])
    assert values["precision@3"] == pytest.approx([1 / 3, 1 / 3])
    assert values["hit@3"].tolist() == [1.0, 1.0]
    assert values["ndcg@3"] == pytest.approx([(1 / log(3)) / (1 + 1 / log(3)), 1 / (1 + 1 / log(3) + 1 / 2)])
    assert values["map@3"] == pytest.approx([(1 / 2) / 2, 1 / 3])
    assert values["map@9"] == pytest.approx([(1 / 2 + 2 / 4) / 2, 1 / 3])
    assert metrics.means(values)["recall@3"] == pytest.approx(5 / 12)
    low, high = metrics.intervals(values)["recall@3"]
    assert (low + high) / 2 == pytest.approx(5 / 12)
    assert high - low == pytest.approx(2 * 1.959964 * (1 / 12), rel=1e-6)  # s = (1/6)/sqrt(2), over sqrt(2)


@pytest.mark.parametrize("seed", range(20))
def test_formulas_on_random_rankings(seed):
    draw = np.random.default_rng(seed)
    items, ks = 30, (1, 2, 5, 30)
    rankings, rank, offsets = {}, [], [0]
    for user in range(int(draw.integers(1, 40))):
        order = draw.permutation(items).tolist()
        held = draw.permutation(items)[: draw.integers(1, items + 1)].tolist()
        rankings[user] = order, set(held)
        rank += [order.index(item) for item in held]
        offsets.append(len(rank))
    values = metrics.per_user(np.array(rank), np.array(offsets), ks)
    assert metrics.means(values) == pytest.approx(plain_metrics(rankings, ks), abs=1e-12)


def test_intervals_hold_the_true_mean_95_times_in_100():
    draw = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        low, high = metrics.intervals({"hit@1": (draw.random(400) < 0.3).astype(float)})["hit@1"]
        inside += low <= 0.3 <= high
    assert 0.93 < inside / 2000 < 0.97


def test_one_user_says_nothing_and_none_gives_nothing():
    values = metrics.per_user(np.array([0]), np.array([0, 1]), (1,))
    assert metrics.intervals(values)["recall@1"] == (0.0, 2.0)
    nobody = metrics.per_user(np.empty(0, int), np.array([0]), (1,))
    assert metrics.means(nobody) == metrics.intervals(nobody) == {}
