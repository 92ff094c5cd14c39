"""Local sparse matrices and their product with dense ones.

On CPUs the product is an embedding-bag sum with per-sample weights: a bag is a row, its indices are columns, and its
weights are entries. This is the same sum as a CSR product. Its vectorised kernel was measured at 2 to 3 times the speed
of CSR through MKL, and 10 times the speed of COO, at width 64.
"""

from __future__ import annotations

import numpy as np
import torch


class Csr:
    """A sparse float32 matrix `[rows, columns]` in compressed sparse row format."""

    def __init__(self, offsets: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, columns: int):
        self.offsets, self.indices, self.values = offsets, indices, values
        self.rows, self.columns = len(offsets) - 1, columns

    @classmethod
    def from_entries(cls, row: np.ndarray, column: np.ndarray, value: np.ndarray, rows: int, columns: int) -> Csr:
        """A matrix from its entries in any order; entries with the same row and column add up in the product."""
        order = np.lexsort((column, row))
        offsets = np.zeros(rows + 1, np.int64)
        np.cumsum(np.bincount(row, minlength=rows), out=offsets[1:])
        index = np.int32 if max(len(row), columns) < 2**31 else np.int64
        return cls(
            torch.from_numpy(offsets.astype(index)),
            torch.from_numpy(column[order].astype(index)),
            torch.from_numpy(value[order].astype(np.float32)),
            columns,
        )

    @torch.no_grad()
    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`self @ x` for `x` `[columns, width]`, without gradient."""
        if not len(self.indices):
            return x.new_zeros(self.rows, x.shape[1])
        return torch.nn.functional.embedding_bag(
            self.indices, x, self.offsets, mode="sum", per_sample_weights=self.values, include_last_offset=True
        )
