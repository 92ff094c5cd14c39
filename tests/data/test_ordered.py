"""Sorting finds the same distinct values as NumPy, bit for bit, and the same members."""

from __future__ import annotations

import numpy as np
import pytest

from distrec.data.ordered import contains, distinct, starts

SIZES = [0, 1, 2, 17, 1_000, 30_000]


def drawn(size: int, seed: int, dtype: str) -> np.ndarray:
    """Random integers, from all equal to nearly all different, with the ends of the type's range."""
    rng, limits = np.random.default_rng([size, seed]), np.iinfo(dtype)
    values = rng.integers(limits.min, limits.max, size, dtype, endpoint=True)
    if seed % 3:
        values = (values % [1, 7, 2 * size + 1][seed % 3]).astype(dtype)
    values[: size // 9] = limits.max
    values[size // 2 : size // 2 + size // 8] = limits.min
    return np.sort(values) if seed % 2 else values


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint64"])
@pytest.mark.parametrize("size", SIZES)
def test_the_same_as_numpy_bit_for_bit(size: int, dtype: str) -> None:
    for seed in range(6):
        values = drawn(size, seed, dtype)
        before = values.copy()
        found, wanted = distinct(values), np.unique(values)
        assert found.dtype == wanted.dtype
        assert np.array_equal(found, wanted)
        assert np.array_equal(values, before)

        ascending = np.sort(values)
        first, count = np.unique(ascending, return_index=True, return_counts=True)[1:]
        assert starts(ascending).dtype == first.dtype
        assert np.array_equal(starts(ascending), first)
        assert np.array_equal(np.diff(starts(ascending), append=size), count)

        asked = np.concatenate([drawn(size, seed + 1, dtype), values[::3]])
        assert np.array_equal(contains(found, asked), np.isin(asked, found))
        assert np.array_equal(asked[contains(found, asked)], asked[np.isin(asked, found)])
