import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrec.data import keyed

DRAWS = {
    "uniform": keyed.uniform,
    "uniform32": keyed.uniform32,
    "integers": lambda key, start, count: keyed.integers(key, start, count, 1000),
    "normal": keyed.normal,
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@given(
    start=st.integers(0, 10_000),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    key=st.tuples(st.text(max_size=3), st.integers()),
)
def test_any_cut_of_a_stream_equals_the_whole(draw, start: int, cuts: list[int], key: tuple[str | int, ...]):
    whole = draw(key, 0, start + sum(cuts))
    parts, at = [], start
    for count in cuts:
        parts.append(draw(key, at, count))
        assert parts[-1].shape == (count,)
        at += count
    assert np.array_equal(np.concatenate([*parts, whole[:0]]), whole[start:])


@pytest.mark.parametrize("width", [1, 7, 40])
def test_any_rows_of_a_matrix_equal_those_of_the_whole(width: int):
    whole = keyed.uniform_rows(("rows", 3), range(50), width)
    assert np.array_equal(whole.reshape(-1), keyed.uniform32(("rows", 3), 0, 50 * width))
    for start, stop in ((0, 50), (13, 14), (13, 41), (50, 50)):
        rows = keyed.uniform_rows(("rows", 3), range(start, stop), width)
        assert (rows.shape, rows.dtype) == ((stop - start, width), np.float32)
        assert np.array_equal(rows, whole[start:stop])


def test_a_stream_can_be_entered_far_out():
    far = 10**15 + 3
    assert np.array_equal(keyed.uniform(("a",), far, 9)[4:], keyed.uniform(("a",), far + 4, 5))


def test_streams_of_different_keys_differ():
    keys = [("a", 1), ("a", 2), ("b", 1), ("a", 1, 0), ("a1",), (1, "a"), ("a", "1"), ("a", -1), ()]
    streams = np.stack([keyed.uniform(key, 0, 4096) for key in keys])
    assert len(np.unique(streams)) == streams.size, "no number occurs twice"
    correlation = np.corrcoef(streams) - np.eye(len(keys))
    assert np.abs(correlation).max() < 5 / np.sqrt(4096)


@pytest.mark.parametrize("seed", range(3))
def test_uniform_numbers_are_uniform(seed: int):
    draws = keyed.uniform(("statistics", seed), 17, 200_000)
    assert draws.dtype == np.float64
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.bincount((draws * 100).astype(int), minlength=100)
    assert chi_square(counts) < 149.4  # 99 degrees of freedom, one in a thousand
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.01, "neighbours are independent"


@pytest.mark.parametrize("bound", [1, 2, 7, 1000, 2**31])
def test_integers_cover_their_range_evenly(bound: int):
    draws = keyed.integers(("statistics", bound), 3, 70_000, bound)
    assert draws.dtype == np.int64
    assert draws.min() >= 0
    assert draws.max() < bound
    bins = min(bound, 7)
    counts = np.bincount(draws * bins // bound, minlength=bins)
    expected = np.diff([-(-edge * bound // bins) for edge in range(bins + 1)]) / bound * len(draws)
    assert ((counts - expected) ** 2 / expected).sum() < 22.5  # 6 degrees of freedom, one in a thousand


@pytest.mark.parametrize("seed", range(3))
def test_normal_numbers_have_the_moments_of_a_normal(seed: int):
    draws = keyed.normal(("statistics", seed), 5, 200_000)
    assert np.isfinite(draws).all()
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert np.mean(draws**power) == pytest.approx(moment, abs=0.08), f"moment {power}"
    assert np.mean(np.abs(draws) > 1.96) == pytest.approx(0.05, abs=0.003)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 1000])
def test_a_permutation_holds_every_number_once(count: int):
    order = keyed.permutation(("order", 1, 2), count)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(count))
    assert np.array_equal(order, keyed.permutation(("order", 1, 2), count))


def test_permutations_are_equally_likely():
    seen = np.array([keyed.permutation(("order", seed), 3) for seed in range(6000)])
    counts = np.bincount(seen @ [9, 3, 1])
    assert chi_square(counts[counts > 0]) < 20.5  # 5 degrees of freedom, one in a thousand
    assert (counts > 0).sum() == 6


def test_golden_values():
    """Pinned numbers: a change of numpy or of the keys would change every trajectory."""
    assert keyed.uniform(("golden", 1), 2, 3).tolist() == GOLDEN_UNIFORM
    assert keyed.integers(("golden", 1), 2, 6, 1000).tolist() == GOLDEN_INTEGERS
    assert keyed.normal(("golden", 1), 2, 3) == pytest.approx(GOLDEN_NORMAL, abs=1e-12)
    assert keyed.permutation(("golden", 1), 10).tolist() == GOLDEN_PERMUTATION


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


GOLDEN_UNIFORM = [0.48320631740262066, 0.8970360701718081, 0.37157181578310694]
GOLDEN_INTEGERS = [483, 897, 371, 692, 494, 47]
GOLDEN_NORMAL = [-0.34172085773849487, 1.1165025009552636, -0.1295639491456654]
GOLDEN_PERMUTATION = [7, 8, 0, 1, 5, 6, 2, 3, 4, 9]
