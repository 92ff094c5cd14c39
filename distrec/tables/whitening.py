"""Whitened features as first values of a table (docs/methods/stair.md section 3.4), no rank holding all features."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from distrec.errors import InputError
from distrec.parallel.partition import Partition
from distrec.parallel.world import World

_ROWS = 16_384  # in float64 at a time
_RANK_TOLERANCE = 1e-6  # of the largest singular value; the Gram matrix loses what lies below 1e-8 of it
_NOISE = 1e-7  # of the features' norm: what lies below is their own rounding, not variation


def whitened(world: World, items: Partition, block: torch.Tensor, dim: int, name: str) -> torch.Tensor:
    """The first `dim` left singular vectors of the centred features, times sqrt(items / dim).

    They come from the reduced Gram matrix, `A = X_c V / sigma`, in float64. Singular vectors have no sign of their own:
    here the entry of V with the largest magnitude is positive, at any number of workers.

    Args:
        block: my rows of the features `[my items, width]`.
        name: of the feature set, for the error.

    Returns:
        My rows, `[my items, dim]` float32.

    Raises:
        InputError: fewer than `dim` independent directions.
    """
    mean = world.sum_(block.sum(0, dtype=torch.float64) / items.rows)

    def centred() -> Iterator[torch.Tensor]:
        return (part.double() - mean for part in block.split(_ROWS))

    gram = torch.zeros(block.shape[1], block.shape[1], dtype=torch.float64)
    for rows in centred():
        gram.addmm_(rows.t(), rows)
    world.sum_(gram)
    norm = world.sum_(block.square().sum(dtype=torch.float64)).sqrt()
    squares, directions = torch.linalg.eigh(gram)
    # All ranks take rank 0's: the same matrix could be decomposed by other kernels on another machine.
    packed = world.rows_from(0, torch.cat([squares.unsqueeze(0), directions]), 0, len(gram) + 1).flip(1)
    sigma, directions = packed[0].clamp(min=0).sqrt(), packed[1:]
    independent = int((sigma > torch.maximum(_RANK_TOLERANCE * sigma[0], _NOISE * norm)).sum())
    if independent < dim:
        raise InputError(
            f"feature '{name}' has {independent} independent directions but 'method.dim' is {dim}, and whitening needs "
            "as many; lower 'method.dim' or use another feature set."
        )
    directions = directions[:, :dim]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    scale = largest.sign() / sigma[:dim] * (items.rows / dim) ** 0.5
    return torch.cat([(rows @ (directions * scale)).float() for rows in centred()])
