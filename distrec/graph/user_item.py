"""The user-item graph with symmetric normalisation, and propagation over it (LightGCN, He et al. 2020, eq. 7-8).

The adjacency over users and items stacked, `A = [[0, R], [R^T, 0]]` with `R_ui = 1 / sqrt(deg_u deg_i)`, is never built:
one hop is `R items` for users and `R^T users` for items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from distrec.graph.matrix import ShardedMatrix, inverse_sqrt
from distrec.graph.polynomial import Weight, polynomial
from distrec.parallel.linear import linear_pair
from distrec.parallel.partition import Partition
from distrec.parallel.world import World


class UserItemGraph:
    """Normalised interactions, partitioned like the user and item tables.

    Args:
        user, item: all training pairs (every rank passes the same arrays); repeated pairs count as often as they occur.
        users, items: partitions of the two sides.
    """

    def __init__(self, world: World, users: Partition, items: Partition, user: np.ndarray, item: np.ndarray):
        user_scale = inverse_sqrt(np.bincount(user, minlength=users.rows).astype(np.float32))
        item_scale = inverse_sqrt(np.bincount(item, minlength=items.rows).astype(np.float32))
        # The row side stays where it is and the column side travels, so the longer side is the row side.
        self._users_are_rows = users.rows >= items.rows
        row_side, rows, columns, row, column = (
            (users, users, items, user, item) if self._users_are_rows else (items, items, users, item, user)
        )
        mine = (row >= row_side.start(world.rank)) & (row < row_side.stop(world.rank))
        value = user_scale[user[mine]] * item_scale[item[mine]]
        self.matrix = ShardedMatrix(
            world, rows, columns, row[mine].astype(np.int64), column[mine].astype(np.int64), value
        )

    def to_users(self, items: torch.Tensor) -> torch.Tensor:
        """My users' rows of `R items`, with gradient."""
        return self.matrix.times(items) if self._users_are_rows else self.matrix.transposed_times(items)

    def to_items(self, users: torch.Tensor) -> torch.Tensor:
        """My items' rows of `R^T users`, with gradient."""
        return self.matrix.transposed_times(users) if self._users_are_rows else self.matrix.times(users)

    def propagate(
        self, users: torch.Tensor, items: torch.Tensor, weights: Sequence[Weight]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`sum_l weights[l] A^l e` for stacked users and items `e`: my rows of both, with gradient.

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
        if self._users_are_rows:
            return self.matrix.times_values(items), self.matrix.transposed_values(users)
        return self.matrix.transposed_values(items), self.matrix.times_values(users)
