"""Vectors with ties and zeros, and their nearest neighbours: in float64, and as the workers find them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from distrec.graph.knn import Neighbours, cosine_neighbours
from distrec.parallel.partition import Partition
from distrec.parallel.world import World

Features = Sequence[tuple[torch.Tensor, int]]  # for each modality: unit vectors [items, width] and k


def unit_vectors(items: int, width: int, seed: int, equal: float = 0.0, zero: int = 0) -> torch.Tensor:
    """Unit vectors `[items, width]`; a share of them is equal, and `zero` of them are zero."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.nn.functional.normalize(torch.randn(items, width, generator=generator), dim=1)
    chosen = torch.randperm(items, generator=generator)
    vectors[chosen[: round(equal * items)]] = vectors[chosen[0]].clone()
    vectors[chosen[items - zero :]] = 0
    return vectors


def nearest(vectors: torch.Tensor, k: int) -> np.ndarray:
    """The k nearest other items `[items, k]`, with the diagonal at -10 and equal cosines in item order."""
    exact = (vectors.double() @ vectors.double().t()).fill_diagonal_(-10).numpy()
    number = np.arange(len(exact))
    return np.stack([np.lexsort((number, -np.round(row, 6)))[:k] for row in exact])


def counted(features: Features) -> torch.Tensor:
    """W of docs/methods/stair.md section 3.3, `[items, items]` float64.

    The edges of all modalities are added up, and W is made symmetric by taking the maximum.
    """
    items = len(features[0][0])
    counts = np.zeros((items, items))
    for vectors, k in features:
        chosen = nearest(vectors, k)
        np.add.at(counts, (np.arange(items)[:, None], chosen), 1)
    return torch.from_numpy(np.maximum(counts, counts.T))


def nearest_of(world: World, partition: Partition, features: Features) -> list[Neighbours]:
    mine = slice(partition.start(world.rank), partition.stop(world.rank))
    return [cosine_neighbours(world, partition, vectors[mine], k, include_self=False) for vectors, k in features]
