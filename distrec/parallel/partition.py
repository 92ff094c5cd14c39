"""Contiguous blocks of rows, the layout of TorchRec's row-wise sharding.

Each rank has `ceil(rows / size)` rows; the last blocks may be shorter or empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Partition:
    """The partition of `total` rows over `size` ranks."""

    total: int
    size: int

    @property
    def block(self) -> int:
        """The number of rows in a full block (at least 1)."""
        return max(1, -(-self.total // self.size))

    def start(self, rank: int) -> int:
        """The first row of `rank`; equals `rows` if its block is empty."""
        return min(rank * self.block, self.total)

    def stop(self, rank: int) -> int:
        """The row after the last row of `rank`."""
        return min((rank + 1) * self.block, self.total)

    def count(self, rank: int) -> int:
        """The number of rows that `rank` owns."""
        return self.stop(rank) - self.start(rank)

    @property
    def counts(self) -> list[int]:
        """The number of rows of every rank."""
        return [self.count(rank) for rank in range(self.size)]

    def owner(self, rows: torch.Tensor) -> torch.Tensor:
        """The rank that owns each of `rows`."""
        return torch.div(rows, self.block, rounding_mode="floor")


def share(count: int, rank: int, size: int) -> tuple[int, int]:
    """The part (start, stop) of `range(count)` that `rank` works on; parts differ by at most one in length."""
    return count * rank // size, count * (rank + 1) // size
