"""Random interactions, small enough for dense algebra: isolated nodes, repeated pairs, both orientations."""

from __future__ import annotations

import numpy as np
import torch

SIZES = [(17, 9), (9, 17), (5, 5), (2, 11), (40, 3)]  # users, items


def pairs(users: int, items: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The user and the item of each pair; the last user and the first item are in no pair, some pairs occur twice."""
    rng = np.random.default_rng(seed)
    count = 3 * max(users, items)
    user, item = rng.integers(0, users - 1, count), rng.integers(1, items, count)
    return np.append(user, user[:5]).astype(np.int32), np.append(item, item[:5]).astype(np.int32)


def normalised(user: np.ndarray, item: np.ndarray, users: int, items: int) -> torch.Tensor:
    """`R` `[users, items]` in float64 with `R_ui = n_ui / sqrt(deg_u deg_i)`, and 0 if a degree is 0."""
    counts = np.zeros((users, items))
    np.add.at(counts, (user, item), 1)
    scale = np.sqrt(np.outer(counts.sum(1), counts.sum(0)))
    return torch.from_numpy(np.divide(counts, scale, out=np.zeros_like(counts), where=scale > 0))


def dense(user: np.ndarray, item: np.ndarray, users: int, items: int) -> torch.Tensor:
    """The stacked adjacency `[[0, R], [R^T, 0]]`, float64."""
    whole = torch.zeros(users + items, users + items, dtype=torch.float64)
    whole[:users, users:] = normalised(user, item, users, items)
    return whole + whole.t()
