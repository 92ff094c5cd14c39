"""Graphs of items from the neighbour lists of one or several modalities, with the normalisations of the papers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from distrec.graph.knn import Neighbours
from distrec.graph.matrix import ShardedMatrix, inverse_sqrt
from distrec.parallel.partition import Partition
from distrec.parallel.world import World

Normalisation = Literal["cosine", "uniform", "symmetric"]
_UNIFORM = 1e-7  # added to the number of neighbours, as the published programs do


def item_graph(
    world: World,
    items: Partition,
    lists: Sequence[Neighbours],
    normalisation: Normalisation,
    weights: Sequence[float] | None = None,
) -> ShardedMatrix:
    """A graph of the items. Collective.

    `cosine`: `S_ij = cos_ij / sqrt(r_i r_j)` for the neighbours j of i, where r are the sums of an item's cosines
    (docs/methods/alignrec.md section 3.2). It is not symmetric. The factor of an item whose sum is not positive, for
    which the formula is undefined, is 0.

    `uniform`: `S_ij = 1 / (k + 1e-7)` for the k neighbours j of i (docs/methods/mentor.md section 3.3).

    `symmetric`: `D^-1/2 W D^-1/2`, where `W_ij` is the larger of two counts: the lists in which j is a neighbour of i,
    and those in which i is one of j (docs/methods/stair.md section 3.3). Cosines only decide which items are near.

    Args:
        items: the partition of the items over the ranks.
        lists: the neighbours of my items, for each modality.
        normalisation: how the entries are weighted.
        weights: of the modalities, whose graphs are added; None: 1 each. `symmetric` takes none.
    """
    if normalisation == "symmetric":
        if weights is not None:
            raise ValueError("a symmetric graph counts modalities and takes no weights")
        return _symmetric(world, items, [found.items for found in lists])
    first = items.start(world.rank)
    rows, columns, values = [], [], []
    for found, weight in zip(lists, weights or [1.0] * len(lists), strict=True):
        count, k = found.items.shape
        rows.append(np.arange(first, first + count).repeat(k))
        columns.append(found.items.reshape(-1).numpy())
        if normalisation == "uniform":
            values.append(np.full(count * k, weight / (k + _UNIFORM), np.float32))
        else:
            value = _by_row_sums(world, items, found)
            values.append((value if weight == 1 else weight * value).reshape(-1).numpy())
    return ShardedMatrix(world, items, items, *(np.concatenate(parts) for parts in (rows, columns, values)))


def _by_row_sums(world: World, items: Partition, found: Neighbours) -> torch.Tensor:
    sums = found.cosines.sum(1)
    scale = torch.where(sums > 0, sums.clamp(min=1e-30).rsqrt(), 0.0)
    everyone = world.gather_blocks(scale, items)
    return scale.unsqueeze(1) * found.cosines * everyone[found.items]


def _symmetric(world: World, items: Partition, neighbours: Sequence[torch.Tensor]) -> ShardedMatrix:
    first = items.start(world.rank)
    rows, columns = [], []
    for nearest in neighbours:
        rows.append(np.repeat(np.arange(first, first + len(nearest)), nearest.shape[1]))
        columns.append(nearest.numpy().reshape(-1))
    keys, counts = np.unique(np.concatenate(rows) * items.total + np.concatenate(columns), return_counts=True)
    mirrored = _to_owners(world, items, keys % items.total, keys // items.total, counts)
    keys = np.concatenate([keys, mirrored[:, 0] * items.total + mirrored[:, 1]])
    counts = np.concatenate([counts, mirrored[:, 2]])
    order = np.lexsort((counts, keys))
    keys, counts = keys[order], counts[order]
    last = np.append(keys[1:] != keys[:-1], True) if len(keys) else np.zeros(0, bool)  # the largest count of each
    row, column, weight = keys[last] // items.total, keys[last] % items.total, counts[last].astype(np.float32)
    mine = np.bincount(row - first, weights=weight, minlength=items.count(world.rank)).astype(np.float32)
    scale = world.gather_blocks(torch.from_numpy(inverse_sqrt(mine)), items).numpy()
    return ShardedMatrix(world, items, items, row, column, weight * scale[row] * scale[column])


def _to_owners(world: World, items: Partition, row: np.ndarray, column: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Send entries to the ranks that own their rows; return those that I own, `[entries, 3]`: row, column, value."""
    order = np.argsort(row, kind="stable")
    entries = torch.from_numpy(np.stack([row, column, value], 1)[order].astype(np.int64))
    bounds = np.searchsorted(row[order], [items.start(rank) for rank in range(world.size)] + [items.total])
    send = np.diff(bounds)
    receive = world.all_to_all(torch.from_numpy(send), [1] * world.size, [1] * world.size)
    return world.all_to_all(entries, send.tolist(), receive.tolist()).numpy()
