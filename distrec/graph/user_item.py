"""The user-item graph with symmetric normalisation, and propagation over it (LightGCN, He et al. 2020, eq. 7-8).

The adjacency matrix over stacked users and items, `A = [[0, R], [R^T, 0]]` with `R_ui = 1 / sqrt(deg_u deg_i)`, is
never built: one hop computes `R items` for users and `R^T users` for items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from distrec.graph.matrix import ShardedMatrix, inverse_sqrt, rows_among
from distrec.graph.polynomial import Weight, polynomial
from distrec.parallel.exchange import counted_rows
from distrec.parallel.linear import linear_pair
from distrec.parallel.partition import Partition
from distrec.parallel.world import World


class UserItemGraph:
    """Normalised interactions, partitioned like the user and item tables.

    One side's rows stay on their ranks. Of the other side, the rows that a rank's edges touch move: they are fetched
    for the sums of the staying side, and pushed back as partial sums for their own side. The side that stays is the one
    for which fewer rows move. This is never worse than fetching rows of both sides, which moves the mean of the two
    counts.

    Args:
        users, items: the partitions of the two sides.
        user, item: all training pairs `[pairs]`; every rank passes the same arrays. A repeated pair counts as often as
            it occurs.
    """

    def __init__(self, world: World, users: Partition, items: Partition, user: np.ndarray, item: np.ndarray):
        user_scale = inverse_sqrt(np.bincount(user, minlength=users.total).astype(np.float32))
        item_scale = inverse_sqrt(np.bincount(item, minlength=items.total).astype(np.float32))
        sides = {"users": (users, items, user, item), "items": (items, users, item, user)}
        self._counted = {stays: _rows_received(world, *side) for stays, side in sides.items()}
        self._stays = min(sides, key=lambda name: (self._counted[name], -sides[name][0].total))
        rows, columns, row, column = sides[self._stays]
        mine = _mine(world, rows, row)
        value = user_scale[user[mine]] * item_scale[item[mine]]
        self.matrix = ShardedMatrix(
            world, rows, columns, row[mine].astype(np.int64), column[mine].astype(np.int64), value
        )

    def record(self) -> dict[str, Any]:
        """For the run record: the matrix's record, which side stays, and the rows received per product either way."""
        return self.matrix.record() | {"stays": self._stays, "rows_received_if_it_stayed": self._counted}

    def to_users(self, items: torch.Tensor) -> torch.Tensor:
        """My users' rows of `R items`, with gradient."""
        return self.matrix.times(items) if self._stays == "users" else self.matrix.transposed_times(items)

    def to_items(self, users: torch.Tensor) -> torch.Tensor:
        """My items' rows of `R^T users`, with gradient."""
        return self.matrix.transposed_times(users) if self._stays == "users" else self.matrix.times(users)

    def propagate(
        self, users: torch.Tensor, items: torch.Tensor, weights: Sequence[Weight]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """My rows of `sum_l weights[l] A^l e` for stacked users and items `e`, with gradient.

        `A` is symmetric, so the map is its own adjoint and the backward pass is one more propagation.
        """

        def apply(users: torch.Tensor, items: torch.Tensor) -> Any:
            return polynomial(self._hop, weights, users, items)

        return linear_pair(users, items, apply, apply)

    def hop(self, users: torch.Tensor, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """My rows of `A e`, with gradient."""
        return linear_pair(users, items, self._hop, self._hop)

    def _hop(self, users: torch.Tensor, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """My rows of `A e`, no gradient."""
        if self._stays == "users":
            return self.matrix.times_values(items), self.matrix.transposed_values(users)
        return self.matrix.transposed_values(items), self.matrix.times_values(users)


def _mine(world: World, side: Partition, numbers: np.ndarray) -> np.ndarray:
    """Whether each of these global numbers is one of my rows, bool."""
    mine: np.ndarray = (numbers >= side.start(world.rank)) & (numbers < side.stop(world.rank))
    return mine


def _rows_received(world: World, rows: Partition, columns: Partition, row: np.ndarray, column: np.ndarray) -> int:
    """The column-side rows that a rank receives per product if the row side stays, with the cheaper exchange."""
    needed = torch.from_numpy(rows_among(column[_mine(world, rows, row)], columns.total))
    return min(counted_rows(world, columns, needed).values())
