"""Symmetric item graphs of several modalities' nearest neighbours (docs/methods/stair.md section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from distrec.graph.matrix import ShardedMatrix, inverse_sqrt
from distrec.parallel.partition import Partition
from distrec.parallel.world import World


def symmetric_neighbour_graph(world: World, items: Partition, neighbours: Sequence[torch.Tensor]) -> ShardedMatrix:
    """The matrix `D^-1/2 W D^-1/2` of an item graph.

    `W_ij` is the larger of two counts: the modalities in which j is among the k nearest neighbours of i, and those in
    which i is among the k nearest of j. The cosines only decide which items are near; W does not contain them. An item
    is not its own neighbour.

    Args:
        items: the partition of the items over the ranks.
        neighbours: for each modality, the k nearest neighbours of each of my items, without itself `[my items, k]`.
    """
    first = items.start(world.rank)
    rows, columns = [], []
    for nearest in neighbours:
        rows.append(np.repeat(np.arange(first, first + len(nearest)), nearest.shape[1]))
        columns.append(nearest.numpy().reshape(-1))
    keys, counts = np.unique(np.concatenate(rows) * items.rows + np.concatenate(columns), return_counts=True)
    mirrored = _to_owners(world, items, keys % items.rows, keys // items.rows, counts)
    keys = np.concatenate([keys, mirrored[:, 0] * items.rows + mirrored[:, 1]])
    counts = np.concatenate([counts, mirrored[:, 2]])
    order = np.lexsort((counts, keys))
    keys, counts = keys[order], counts[order]
    last = np.append(keys[1:] != keys[:-1], True) if len(keys) else np.zeros(0, bool)  # the largest count of each
    row, column, weight = keys[last] // items.rows, keys[last] % items.rows, counts[last].astype(np.float32)
    mine = np.bincount(row - first, weights=weight, minlength=items.count(world.rank)).astype(np.float32)
    scale = world.gather_blocks(torch.from_numpy(inverse_sqrt(mine)), items).numpy()
    return ShardedMatrix(world, items, items, row, column, weight * scale[row] * scale[column])


def _to_owners(world: World, items: Partition, row: np.ndarray, column: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Send entries to the ranks that own their rows; return those that I own, `[entries, 3]`: row, column, value."""
    order = np.argsort(row, kind="stable")
    entries = torch.from_numpy(np.stack([row, column, value], 1)[order].astype(np.int64))
    bounds = np.searchsorted(row[order], [items.start(rank) for rank in range(world.size)] + [items.rows])
    send = np.diff(bounds)
    receive = world.all_to_all(torch.from_numpy(send), [1] * world.size, [1] * world.size)
    return world.all_to_all(entries, send.tolist(), receive.tolist()).numpy()
