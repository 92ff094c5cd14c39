"""A sparse matrix whose rows and columns are partitioned over the ranks like two tables, and its products."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from distrec.graph.sparse import Csr
from distrec.parallel.exchange import Exchange, planned_exchange
from distrec.parallel.linear import linear
from distrec.parallel.partition import Partition
from distrec.parallel.world import World


class ShardedMatrix:
    """A sparse matrix `M` `[rows, columns]`; each rank holds the entries of its rows.

    Each product moves column-side rows between ranks once: `M x` fetches them from their owners, and `M^T y` pushes
    partial sums back to them. Row-side rows never move.

    Args:
        rows, columns: the partitions of the two sides.
        row, column: the entries of my rows as global numbers, int64 `[entries]`, in any order.
        value: the weights of the entries, float32 `[entries]`.
    """

    def __init__(
        self, world: World, rows: Partition, columns: Partition, row: np.ndarray, column: np.ndarray, value: np.ndarray
    ):
        self.world, self.row_partition, self.column_partition = world, rows, columns
        needed = rows_among(column, columns.total)
        self.exchange: Exchange
        self.exchange, position = planned_exchange(world, columns, torch.from_numpy(needed))
        local_row = row - rows.start(world.rank)
        place = np.zeros(columns.total, np.int64)
        place[needed] = position.numpy()
        local_column = place[column]
        count = rows.count(world.rank)
        self._by_row = Csr.from_entries(local_row, local_column, value, count, self.exchange.needed)
        self._by_column = Csr.from_entries(local_column, local_row, value, self.exchange.needed, count)

    def times_values(self, x: torch.Tensor) -> torch.Tensor:
        """My rows of `M x`, `[my rows, width]`, from my column-side block `x` `[my columns, width]`; no gradient."""
        return self._by_row.matmul(self.exchange.fetch_values(x))

    def transposed_values(self, y: torch.Tensor) -> torch.Tensor:
        """My column-side rows of `M^T y`, `[my columns, width]`, from my block `y` `[my rows, width]`; no gradient."""
        return self.exchange.push_values(self._by_column.matmul(y))

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """My rows of `M x` `[my rows, width]` from my block of `x` `[my columns, width]`, with gradient."""
        return linear(x, self.times_values, self.transposed_values)

    def transposed_times(self, y: torch.Tensor) -> torch.Tensor:
        """My rows of `M^T y` `[my columns, width]` from my block of `y` `[my rows, width]`, with gradient."""
        return linear(y, self.transposed_values, self.times_values)

    def record(self) -> dict[str, Any]:
        """For the run record: this rank's number of entries, the chosen exchange, and the rows received per product."""
        return {
            "rows": self.row_partition.total,
            "columns": self.column_partition.total,
            "my_entries": len(self._by_row.values),
            "exchange": self.exchange.strategy,
            "rows_received_per_product": self.exchange.received,
            "rows_received_if_gathered": self.column_partition.block * (self.world.size - 1),
        }


def rows_among(numbers: np.ndarray, count: int) -> np.ndarray:
    """The distinct values in `numbers`, all below `count`, in ascending order; without a sort, slow for many edges."""
    occurs = np.zeros(count, bool)
    occurs[numbers] = True
    return np.flatnonzero(occurs)


def inverse_sqrt(degree: np.ndarray) -> np.ndarray:
    """`degree ** -0.5` in float32, and 0 for a degree of 0."""
    out = np.zeros(len(degree), np.float32)
    np.power(degree, -0.5, where=degree > 0, out=out, dtype=np.float32, casting="same_kind")
    return out
