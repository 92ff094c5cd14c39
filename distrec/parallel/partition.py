"""Contiguous row blocks, the layout of TorchRec's row-wise sharding: `ceil(rows / size)` rows each, the last ones short or empty."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Partition:
    """How `rows` rows lie on `size` ranks."""

    rows: int
    size: int

    @property
    def block(self) -> int:
        """Rows of a full block (at least 1)."""
        return max(1, -(-self.rows // self.size))

    def start(self, rank: int) -> int:
        """First row of `rank`; equals `rows` where its block is empty."""
        return min(rank * self.block, self.rows)

    def stop(self, rank: int) -> int:
        """One past the last row of `rank`."""
        return min((rank + 1) * self.block, self.rows)

    def count(self, rank: int) -> int:
        """Rows that `rank` owns."""
        return self.stop(rank) - self.start(rank)

    @property
    def counts(self) -> list[int]:
        """Rows of every rank."""
        return [self.count(rank) for rank in range(self.size)]

    def owner(self, rows: torch.Tensor) -> torch.Tensor:
        """The rank that owns each of `rows`."""
        return torch.div(rows, self.block, rounding_mode="floor")


def share(count: int, rank: int, size: int) -> tuple[int, int]:
    """The contiguous range of `range(count)` that `rank` works on; ranges differ by at most one in length."""
    return count * rank // size, count * (rank + 1) // size
