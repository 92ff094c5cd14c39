import numpy as np
import pytest

from distrec.data import keyed, sampling
from distrec.data.dataset import Interactions
from distrec.data.sampling import PairSampler, TripleSampler
from distrec.errors import InputError


def drawn(rows: int, users: int, items: int, seed: int) -> Interactions:
    """Distinct pairs, sorted by user; the last items never occur."""
    rng = np.random.default_rng(seed)
    keys = np.sort(rng.choice(users * (items - 2), rows, replace=False))
    user, item = keys // (items - 2), keys % (items - 2)
    return Interactions(user.astype(np.int32), item.astype(np.int32), np.zeros(rows, np.int64))


CASES = [(60, 20, 9, 0), (500, 40, 100, 1), (1000, 300, 12, 2)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("global_batch", [1, 7, 64, 4096])
def test_every_row_is_trained_exactly_once_an_epoch(case: tuple[int, ...], global_batch: int):
    train = drawn(*case)
    sampler = TripleSampler(train, case[2], seed=case[3], negatives_from="train")
    orders = []
    for epoch in (0, 1, 5):
        batches = [sampler.batch(epoch, step, global_batch) for step in range(-(-len(sampler) // global_batch))]
        assert all(len(batch.rows) == global_batch for batch in batches[:-1])
        assert 0 < len(batches[-1].rows) <= global_batch
        rows = np.concatenate([batch.rows for batch in batches])
        assert np.array_equal(np.sort(rows), np.arange(len(train)))
        orders.append(tuple(rows.tolist()))
        for batch in batches:
            assert np.array_equal(batch.users, train.user[batch.rows])
            assert np.array_equal(batch.positives, train.item[batch.rows])
            assert {array.dtype for array in (batch.users, batch.positives, batch.negatives)} == {np.dtype(np.int64)}
    assert len(set(orders)) == 3


@pytest.mark.parametrize("case", CASES)
def test_a_batch_depends_on_nothing_but_seed_epoch_and_place(case: tuple[int, ...]):
    """Each position has the same triple, whatever the order of the calls and the batch size."""
    train, items = drawn(*case), case[2]

    def epoch(global_batch: int, reverse: bool) -> np.ndarray:
        sampler = TripleSampler(train, items, 3, "train")
        steps = range(-(-len(sampler) // global_batch))
        found = {}
        for step in reversed(steps) if reverse else steps:
            batch = sampler.batch(2, step, global_batch)
            found[step] = np.stack([batch.users, batch.positives, batch.negatives])
            sampler.batch(1, step, global_batch)  # another epoch in between changes nothing
        return np.concatenate([found[step] for step in steps], 1)

    whole = epoch(len(train), reverse=False)
    for global_batch in (1, 10, 33):
        assert np.array_equal(epoch(global_batch, reverse=True), whole)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("negatives_from", ["train", "all"])
def test_a_negative_is_never_a_training_item_of_the_user(case: tuple[int, ...], negatives_from):
    train, items = drawn(*case), case[2]
    positives = set(zip(train.user.tolist(), train.item.tolist(), strict=True))
    sampler = TripleSampler(train, items, case[3], negatives_from)
    seen = set()
    for epoch in range(20):
        batch = sampler.batch(epoch, 0, len(train))
        assert not positives & set(zip(batch.users.tolist(), batch.negatives.tolist(), strict=True))
        seen |= set(batch.negatives.tolist())
    allowed = set(train.item.tolist()) if negatives_from == "train" else set(range(items))
    assert seen == allowed, "every candidate is drawn sooner or later, and nothing else"


@pytest.mark.parametrize("attempts", [0, 1, 32])
def test_negatives_are_uniform_over_the_candidates(attempts: int, monkeypatch: pytest.MonkeyPatch):
    """For a user with few items and one with nearly all; with few attempts the exhaustive branch draws."""
    monkeypatch.setattr(sampling, "_ATTEMPTS", attempts)
    items, few, many = 30, [4, 9], [item for item in range(30) if item not in (0, 13, 29)]
    user = np.array([0] * len(few) + [1] * len(many) + [2] * items)
    item = np.array(few + many + list(range(items)))
    keep = ~((user == 2) & (item == 5))  # user 2 has all items but one
    train = Interactions(user[keep].astype(np.int32), item[keep].astype(np.int32), np.zeros(keep.sum(), np.int64))
    sampler = TripleSampler(train, items, 1, "train")
    counts = np.zeros((3, items))
    for epoch in range(250):
        batch = sampler.batch(epoch, 0, len(train))
        np.add.at(counts, (batch.users, batch.negatives), 1)
    assert counts[0, few].sum() == 0
    assert chi_square(np.delete(counts[0], few)) < 55.5  # 27 degrees of freedom, one in a thousand
    assert counts[1, many].sum() == 0
    assert chi_square(counts[1, [0, 13, 29]]) < 13.9  # 2 degrees of freedom
    assert counts[2].argmax() == 5
    assert counts[2].sum() == counts[2, 5]


def test_the_exhaustive_branch_is_reached_by_a_user_with_nearly_all_items():
    """A user with 499 of 500 items: 32 uniform draws find the free item in only 6 % of rows."""
    user, item = np.array([0] * 499 + [1] * 500), np.append(np.arange(499), np.arange(500))
    keep = ~((user == 1) & (item == 7))
    train = Interactions(user[keep].astype(np.int32), item[keep].astype(np.int32), np.zeros(keep.sum(), np.int64))
    batch = TripleSampler(train, 500, 1, "train").batch(0, 0, len(train))
    assert set(batch.negatives[batch.users == 0].tolist()) == {499}
    assert set(batch.negatives[batch.users == 1].tolist()) == {7}


def test_repeated_pairs_are_trained_as_often_as_they_occur_and_count_once_as_positives():
    train = Interactions(np.zeros(6, np.int32), np.array([0, 0, 0, 1, 1, 0], np.int32), np.zeros(6, np.int64))
    batch = TripleSampler(train, 3, 1, "all").batch(0, 0, 6)
    assert set(batch.negatives.tolist()) == {2}
    assert np.bincount(batch.positives).tolist() == [4, 2]


def test_a_user_with_every_candidate_is_refused():
    train = Interactions(np.array([0, 0, 1], np.int32), np.array([0, 1, 0], np.int32), np.zeros(3, np.int64))
    with pytest.raises(InputError, match="user 0 has all 2 candidate items"):
        TripleSampler(train, 3, 1, "train")
    batch = TripleSampler(train, 3, 1, "all").batch(0, 0, 3)
    assert set(batch.negatives[batch.users == 0].tolist()) == {2}


def test_an_item_held_out_for_validation_can_be_a_negative():
    """Item 2 is only another user's training item, so it may be drawn for user 0, whatever is in the other splits."""
    train = Interactions(np.array([0, 1], np.int32), np.array([0, 2], np.int32), np.zeros(2, np.int64))
    batch = TripleSampler(train, 3, 1, "train").batch(0, 0, 2)
    assert batch.negatives[batch.users == 0].tolist() == [2]


def test_seeds_epochs_and_uses_are_different_streams():
    train = drawn(500, 40, 100, 1)
    batches = [
        TripleSampler(train, 100, seed, "train").batch(epoch, 0, 500)
        for seed, epoch in ((1, 0), (2, 0), (1, 1), (2, 1))
    ]
    for name in ("rows", "negatives"):
        assert len({getattr(batch, name).tobytes() for batch in batches}) == 4


def test_golden_batch():
    """Pinned batch: the order is keyed by (order, seed, epoch), negatives by (negatives, seed, epoch, attempt)."""
    train = drawn(60, 20, 9, 0)
    batch = TripleSampler(train, 9, seed=5, negatives_from="train").batch(3, 1, 8)
    order = keyed.permutation(("order", 5, 3), 60)
    assert np.array_equal(batch.rows, order[8:16])
    assert batch.rows.tolist() == GOLDEN_ROWS
    assert batch.negatives.tolist() == GOLDEN_NEGATIVES


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


GOLDEN_ROWS = [7, 5, 28, 43, 0, 36, 25, 21]
GOLDEN_NEGATIVES = [4, 0, 1, 6, 5, 2, 2, 5]


def test_pairs_come_in_the_order_of_triples():
    train = drawn(50, 40, 400, 1)
    for epoch in (0, 3):
        pairs, triples = (
            PairSampler(train, 5).batch(epoch, 1, 64),
            TripleSampler(train, 40, 5, "all").batch(epoch, 1, 64),
        )
        for name in ("users", "positives", "rows"):
            assert np.array_equal(getattr(pairs, name), getattr(triples, name))
