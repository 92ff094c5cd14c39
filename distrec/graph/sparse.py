"""Local sparse matrices and their product with dense ones.

On CPU the product runs as an embedding-bag sum with per-sample weights (bag = row, indices = columns, weights =
entries): the same sum as a CSR product, on a vectorised kernel that measured 2 to 3 times faster than CSR through MKL
and 10 times faster than COO at width 64.
"""

from __future__ import annotations

import numpy as np
import torch


class Csr:
    """A sparse `[rows, columns]` float32 matrix by rows."""

    def __init__(self, offsets: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, columns: int):
        self.offsets, self.indices, self.values = offsets, indices, values
        self.rows, self.columns = len(offsets) - 1, columns

    @classmethod
    def from_entries(cls, row: np.ndarray, column: np.ndarray, value: np.ndarray, rows: int, columns: int) -> Csr:
        """From entries in any order; equal (row, column) pairs add up in the product."""
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
