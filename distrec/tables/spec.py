"""What a method defines about a table: name, side (users or items), width and initial values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch

from distrec.config.run import OptimizerSection
from distrec.data import keyed
from distrec.parallel.partition import Partition

Side = Literal["user", "item"]


class Initializer(Protocol):
    """Initial values of rows `start:stop` of a table `[rows, dim]`, as `[stop - start, dim]` float32.

    A row's values depend on the key, the table's shape and the row's number, not on `start` and `stop`.
    """

    def __call__(self, key: tuple[str | int, ...], rows: int, dim: int, start: int, stop: int) -> np.ndarray: ...


def xavier_uniform(key: tuple[str | int, ...], rows: int, dim: int, start: int, stop: int) -> np.ndarray:
    """Uniform between -b and b with b = sqrt(6 / (rows + dim)) (Glorot & Bengio 2010)."""
    draws = keyed.uniform(key, start * dim, (stop - start) * dim)
    bound = math.sqrt(6 / (rows + dim))
    return ((2 * draws - 1) * bound).astype(np.float32).reshape(-1, dim)


def xavier_normal(key: tuple[str | int, ...], rows: int, dim: int, start: int, stop: int) -> np.ndarray:
    """Normal with standard deviation sqrt(2 / (rows + dim)) (Glorot & Bengio 2010)."""
    return normal(math.sqrt(2 / (rows + dim)))(key, rows, dim, start, stop)


def normal(std: float) -> Initializer:
    """Normal with standard deviation `std`."""

    def init(key: tuple[str | int, ...], rows: int, dim: int, start: int, stop: int) -> np.ndarray:
        draws = keyed.normal(key, start * dim, (stop - start) * dim)
        return (draws * std).astype(np.float32).reshape(-1, dim)

    return init


def side_by_side(parts: Sequence[tuple[str, Initializer]]) -> Initializer:
    """Concatenate parts of equal width, each drawn under its own name as if it were a separate table."""

    def init(key: tuple[str | int, ...], rows: int, dim: int, start: int, stop: int) -> np.ndarray:
        width = dim // len(parts)
        return np.concatenate([draw((*key, name), rows, width, start, stop) for name, draw in parts], 1)

    return init


@dataclass(frozen=True)
class Table:
    """A trainable vector per user or per item."""

    name: str
    side: Side
    dim: int
    init: Initializer = xavier_uniform
    start: Callable[[], torch.Tensor] | None = None
    """In place of `init`: the initial values of my rows, `[my rows, dim]` float32. Every worker calls it once, after
    the method was built, so it may be collective."""
    smooth: Callable[[torch.Tensor], torch.Tensor] | None = None
    """A linear map, from `[my rows, dim]` to the same shape, that is applied to every update; collective."""


# Float32 copies of each row that training needs beyond the weight itself: gradient and moments.
EXTRA_COPIES = {"adam": 3, "adamw": 3, "sgd": 1}


def plan_tables(
    tables: Sequence[Table], partitions: Mapping[Side, Partition], optimizer: OptimizerSection
) -> list[dict[str, Any]]:
    """The sharding of each table over the workers, for `run.json`; bytes per worker include gradient and moments."""
    copies = EXTRA_COPIES[optimizer.name] if optimizer.tables == "exact" else 0
    return [
        {
            "table": table.name,
            "rows": partitions[table.side].total,
            "dim": table.dim,
            "sharding": "row_wise",
            "kernel": "dense" if optimizer.tables == "exact" else "fused",
            "rows_per_worker": partitions[table.side].block,
            "bytes_per_worker": partitions[table.side].block * table.dim * 4 * (1 + copies),
        }
        for table in tables
    ]
