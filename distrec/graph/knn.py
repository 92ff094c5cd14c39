"""Exact nearest neighbours of items by cosine, computed in blocks; no items x items matrix is ever in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch

from distrec.parallel.partition import Partition
from distrec.parallel.topk import merge_top, top_columns
from distrec.parallel.world import World

_ROWS, _COLUMNS = 1024, 8192
_TILE = 64


class Neighbours(NamedTuple):
    """The nearest items of each of mine, best first, equal cosines in item order.

    Attributes:
        cosines: `[my items, k]`.
        items: their numbers, `[my items, k]`.
    """

    cosines: torch.Tensor
    items: torch.Tensor


def cosine_neighbours(
    world: World, partition: Partition, block: torch.Tensor, k: int, include_self: bool = True
) -> Neighbours:
    """The k most similar items of each of my items. Collective.

    Args:
        partition: the partition of the items over the ranks.
        block: my items' vectors `[my items, width]`, each of unit length or zero.
        k: the number of neighbours; lowered to the number of items that can be neighbours.
        include_self: whether an item may be its own neighbour.
    """
    k = min(k, partition.total if include_self else partition.total - 1)
    mine = torch.arange(partition.start(world.rank), partition.stop(world.rank))
    values = torch.empty(len(block), 0)
    items = torch.empty(len(block), 0, dtype=torch.int64)
    for start in range(0, partition.total, _COLUMNS):
        stop = min(start + _COLUMNS, partition.total)
        candidates = world.chunk(block, partition, start, stop)
        parts = []
        for rows, numbers in zip(block.split(_ROWS), mine.split(_ROWS), strict=True):
            cosines = _products(rows, candidates)
            if not include_self:
                (own,) = ((numbers >= start) & (numbers < stop)).nonzero(as_tuple=True)
                cosines[own, numbers[own] - start] = -torch.inf
            parts.append(top_columns(cosines, k))
        if parts:
            best = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]) + start
            values, items = merge_top(values, items, *best, k)
    return Neighbours(values, items)


def _products(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """`rows @ columns^T`, computed in whole tiles that are padded with zeros.

    Matrix libraries use other kernels for the last few rows and columns, which round differently. Equal vectors would
    get unequal cosines there, and the order of equal neighbours would depend on how the rows are cut.
    """
    filled = _filled(rows) @ _filled(columns).t()
    return filled[: len(rows), : len(columns)]


def _filled(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % _TILE))
