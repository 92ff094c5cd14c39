"""Random numbers keyed by what they are for, not by who draws them.

A stream is named by a tuple such as `("negatives", seed, epoch, attempt)`. Element `i` of a stream is the same number
no matter which worker draws it or how the range is divided, because Philox is a counter-based generator whose state can
be set to any position. All random numbers of training come from here, so a run is the same at any size.
"""

from __future__ import annotations

import hashlib

import numpy as np

_LANES = 4  # 64-bit numbers per counter value of Philox4x64


def _generator(key: tuple[str | int, ...], position: int, lanes: int = _LANES) -> tuple[np.random.Generator, int]:
    """A generator at the counter value that contains `position`, and how many of its `lanes` numbers to skip."""
    name = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    bits = np.random.Philox(key=np.frombuffer(name, np.uint64))
    bits.advance(position // lanes)
    return np.random.Generator(bits), position % lanes


def number(key: tuple[str | int, ...]) -> int:
    """One number in [0, 2**63) derived from `key`, to seed generators of other libraries."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def uniform(key: tuple[str | int, ...], start: int, count: int) -> np.ndarray:
    """Elements `start : start + count` of stream `key`: float64 in [0, 1)."""
    generator, skip = _generator(key, start)
    return generator.random(skip + count)[skip:]


def uniform32(key: tuple[str | int, ...], start: int, count: int) -> np.ndarray:
    """Elements `start : start + count` of stream `key`: float32 in [0, 1), two from each 64-bit number."""
    generator, skip = _generator(key, start, 2 * _LANES)
    return generator.random(skip + count, np.float32)[skip:]


def uniform_rows(key: tuple[str | int, ...], rows: range, width: int) -> np.ndarray:
    """Consecutive rows of a matrix with `width` columns that stream `key` fills row by row.

    A worker that holds some rows draws only these and gets the same numbers as one that draws all rows.

    Returns:
        `[len(rows), width]` float32 in [0, 1), two from each 64-bit number.
    """
    return uniform32(key, rows.start * width, len(rows) * width).reshape(len(rows), width)


def integers(key: tuple[str | int, ...], start: int, count: int, bound: int) -> np.ndarray:
    """Elements `start : start + count` of stream `key`: int64 in [0, bound), where `bound` is at most 2**31."""
    return (uniform(key, start, count) * bound).astype(np.int64)


def normal(key: tuple[str | int, ...], start: int, count: int) -> np.ndarray:
    """Elements `start : start + count` of stream `key`: float64 standard normal (Box-Muller on two uniforms each)."""
    pairs = uniform(key, 2 * start, 2 * count).reshape(count, 2)
    return np.sqrt(-2.0 * np.log1p(-pairs[:, 0])) * np.cos(2.0 * np.pi * pairs[:, 1])


def permutation(key: tuple[str | int, ...], count: int) -> np.ndarray:
    """A random permutation of `range(count)`, int64, derived from `key`."""
    generator, _ = _generator(key, 0)
    return generator.permutation(count)
