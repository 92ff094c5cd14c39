import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from distrec.errors import InputError
from distrec.evaluation import Evaluator, Ranked, chunks, probes, ranking
from distrec.parallel.partition import Partition
from distrec.parallel.world import World
from tests.distributed import run_workers
from tests.evaluation.cases import KS, Case, evaluate, inner, pairs, plain_metrics, plain_rankings, random_case

SIZES = [
    # users, items, held-out pairs, masked pairs
    (1, 1, 1, 0),
    (3, 2, 4, 1),
    (7, 15, 30, 20),  # fewer items than the longest cut-off
    (40, 33, 200, 100),
    (300, 100, 900, 2000),
    (601, 257, 700, 3000),
]


def assert_plain(case, result: Ranked) -> None:
    expected = plain_rankings(case, case.users @ case.items.T)
    assert result.user.tolist() == list(expected)
    for number, (order, held) in enumerate(expected.values()):
        part = slice(result.offsets[number], result.offsets[number + 1])
        assert result.item[part].tolist() == sorted(held)
        places = [min(order.index(item), KS[-1]) if item in order else KS[-1] for item in sorted(held)]
        assert result.rank[part].tolist() == places
        assert result.masked[part].tolist() == [item not in order for item in sorted(held)]
    assert result.metrics() == pytest.approx(plain_metrics(expected), abs=1e-12)


@pytest.mark.parametrize("kind", ["ties", "exact"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("users", "items", "held_out", "masked"), SIZES)
def test_ranks_and_metrics_are_those_of_a_plain_sort(users, items, held_out, masked, seed, kind):
    case = random_case(seed, users, items, held_out, masked, kind)
    assert_plain(case, evaluate(case))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["ties", "exact"])
@pytest.mark.parametrize(("user_chunk", "item_chunk"), [(1, 1), (2, 7), (16, 33), (64, 1000)])
def test_chunks_change_nothing(monkeypatch, user_chunk, item_chunk, kind, seed):
    monkeypatch.setattr(chunks, "USERS_PER_CHUNK", user_chunk)
    monkeypatch.setattr(ranking, "ITEMS_PER_CHUNK", item_chunk)
    case = random_case(seed, 40, 100, 150, 200, kind)
    assert_plain(case, evaluate(case))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["ties", "exact"])
@pytest.mark.parametrize("few", [40, 60])
def test_probes_change_nothing(monkeypatch, few, kind, seed):
    monkeypatch.setattr(probes, "PROBES", few)
    monkeypatch.setattr(chunks, "USERS_PER_CHUNK", 32)
    case = random_case(seed, 150, 4 * few + 13, 300, 900, kind)
    evaluator = Evaluator(World(0, 1), Partition(150, 1), Partition(4 * few + 13, 1), case.held_out, case.masked, KS)
    undecided = evaluator._probes.undecided(case.users, case.items, inner)
    assert 0 < len(undecided) < len(evaluator.pairs.user)  # some users were decided early, but not all
    assert_plain(case, evaluate(case))


def falling(masked: int, held_out: int, users: int = 300, items: int = 160) -> Case:
    """For every user, scores fall with the item number, the first items are masked, and one item is held out."""
    user = np.arange(users)
    return Case(
        torch.ones(users, 1),
        torch.arange(items, 0, -1.0).unsqueeze(1),
        pairs(user, np.full(users, held_out)),
        [pairs(np.repeat(user, masked), np.tile(np.arange(masked), users))],
    )


def test_masked_probes_do_not_count(monkeypatch):
    monkeypatch.setattr(probes, "PROBES", 40)
    assert evaluate(falling(masked=35, held_out=36)).rank.tolist() == [1] * 300
    assert evaluate(falling(masked=10, held_out=100)).rank.tolist() == [KS[-1]] * 300


def test_items_that_no_probe_needs_are_still_checked(monkeypatch):
    monkeypatch.setattr(probes, "PROBES", 40)
    case = falling(masked=10, held_out=100)
    case.items[150] = float("nan")
    with pytest.raises(FloatingPointError, match=r"^the score of user 0 and item 150 is"):
        evaluate(case)


def test_probes_with_users_of_many_held_out_items_only(monkeypatch):
    monkeypatch.setattr(probes, "PROBES", 20)
    case = random_case(0, 6, 80, 200, 100, "ties")
    assert_plain(case, evaluate(case))


def test_more_items_than_a_chunk():
    case = random_case(0, 30, 2 * ranking.ITEMS_PER_CHUNK + 77, 100, 500, "ties")
    case.users[:, 2:] = 0  # 25 different scores for all items
    assert_plain(case, evaluate(case))


def test_all_scores_equal_rank_by_item_number():
    case = random_case(1, 20, 50, 60, 100, "ties")
    case.items.zero_()
    assert_plain(case, evaluate(case))


def test_a_scorer_over_several_vectors_per_user():
    draw = torch.Generator().manual_seed(0)
    case = random_case(2, 50, 60, 120, 100, "rounded")
    interests = torch.randn(50, 3, 4, generator=draw)

    def best(users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        return (users @ items.T).amax(1)

    evaluator = Evaluator(World(0, 1), Partition(50, 1), Partition(60, 1), case.held_out, case.masked, KS)
    result = evaluator.rank(interests, case.items, best)
    assert result.metrics() == pytest.approx(
        plain_metrics(plain_rankings(case, best(interests, case.items))), abs=1e-12
    )


def test_a_scorer_that_ignores_the_user_may_give_a_view():
    case = random_case(3, 300, 40, 500, 300, "ties")
    evaluator = Evaluator(World(0, 1), Partition(300, 1), Partition(40, 1), case.held_out, case.masked, KS)
    popularity = torch.arange(40.0).unsqueeze(1) % 7
    result = evaluator.rank(case.users, popularity, lambda users, items: items.T.expand(len(users), -1))
    expected = plain_rankings(case, popularity.T.expand(300, -1))
    assert result.metrics() == pytest.approx(plain_metrics(expected), abs=1e-12)
    assert popularity.isfinite().all()


@pytest.mark.parametrize("few", [20, 512])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_is_named(monkeypatch, value, few):
    monkeypatch.setattr(probes, "PROBES", few)
    case = random_case(0, 30, 100, 60, 10, "ties")
    user = int(case.held_out.user[7])
    case.items[:] = 1.0
    case.items[5, 0] = value
    case.users[:] = 1.0
    first = int(case.held_out.user.min())
    with pytest.raises(FloatingPointError, match=f"^the score of user {first} and item 5 is NaN or infinite$"):
        evaluate(case)
    case.items[5, 0] = 1.0
    case.users[user, 1] = value
    with pytest.raises(FloatingPointError, match=f"^the score of user {user} and item 0 is NaN or infinite$"):
        evaluate(case)


def test_scores_whose_sum_overflows_are_fine():
    case = random_case(0, 30, 20, 60, 10, "ties")
    case.users[:], case.items[:] = 1e19, 1e18
    assert_plain(case, evaluate(case))


def test_users_without_a_finite_vector_do_not_matter_if_they_are_not_evaluated():
    case = random_case(0, 30, 20, 60, 10, "ties")
    others = np.setdiff1d(np.arange(30), case.held_out.user)
    expected = evaluate(case)
    case.users[others] = float("nan")
    assert np.array_equal(evaluate(case).rank, expected.rank)


def test_nothing_held_out_is_refused():
    nobody = pairs(np.empty(0), np.empty(0))
    with pytest.raises(InputError, match="no interactions"):
        Evaluator(World(0, 1), Partition(3, 1), Partition(3, 1), nobody, [], KS)


def test_keep_restricts_pairs_and_users():
    case = random_case(5, 60, 40, 200, 100, "ties")
    whole = evaluate(case)
    chosen = whole.item < 11
    part = whole.keep(chosen)
    rankings = plain_rankings(case, case.users @ case.items.T)
    expected = {
        user: (order, {item for item in held if item < 11})
        for user, (order, held) in rankings.items()
        if any(item < 11 for item in held)
    }
    assert part.user.tolist() == list(expected)
    assert part.metrics() == pytest.approx(plain_metrics(expected), abs=1e-12)
    nobody = whole.keep(np.zeros_like(chosen))
    assert (len(nobody.user), nobody.metrics(), nobody.intervals()) == (0, {}, {})
    assert np.array_equal(whole.keep(np.ones_like(chosen)).rank, whole.rank)


def fingerprints() -> list[str]:
    """The digests of many evaluations in this process's world, and the error of one with a score that is not finite."""
    out = []
    sizes = [*SIZES, (1500, 2412, 1900, 4000), (5, 3000, 9, 10)]
    kept = ranking.ITEMS_PER_CHUNK
    for ranking.ITEMS_PER_CHUNK in (1000, kept):
        for seed, (users, items, held_out, masked) in enumerate(sizes):
            for kind in ("ties", "rounded"):
                result = evaluate(random_case(seed, users, items, held_out, masked, kind, dim=37))
                parts = (result.user, result.offsets, result.item, result.rank, result.masked)
                digest = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts))
                out.append(digest.hexdigest() + str(sorted(result.metrics().items())))
    case = random_case(0, 700, 300, 900, 10, "ties")
    case.users[case.held_out.user[3], 0] = float("nan")
    with pytest.raises(FloatingPointError) as error:
        evaluate(case)
    return [*out, str(error.value)]


@pytest.mark.multiprocess
def test_same_bits_at_any_number_of_workers_and_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = fingerprints()
        torch.set_num_threads(2)
        assert fingerprints() == expected
        with ThreadPoolExecutor(1) as pool:  # a new thread inherits the setting from before the evaluation
            assert [torch.get_num_threads(), pool.submit(torch.get_num_threads).result()] == [2, 2]
    finally:
        torch.set_num_threads(threads)
    for size in (2, 3, 4):
        assert run_workers(fingerprints, size) == [expected] * size
