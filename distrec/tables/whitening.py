"""Whitened features as initial values of a table (docs/methods/stair.md section 3.4).

No rank needs the features of all items.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from distrec.errors import InputError
from distrec.parallel.partition import Partition
from distrec.parallel.world import World

_ROWS = 16_384  # number of rows converted to float64 at a time
_RANK_TOLERANCE = 1e-6  # relative to the largest singular value; the Gram matrix cannot resolve less than 1e-8 of it
_NOISE = 1e-7  # relative to the features' norm; smaller singular values come from rounding of the features


def whitened(world: World, items: Partition, block: torch.Tensor, dim: int, name: str) -> torch.Tensor:
    """The first `dim` left singular vectors of the centred features, times sqrt(items / dim). Collective.

    They are computed in float64 as `A = X_c V / sigma`, from the Gram matrix summed over ranks. The sign of a singular
    vector is arbitrary: here the entry of V with the largest magnitude is positive, at any number of workers.

    Args:
        block: my rows of the features `[my items, width]`.
        name: the feature set's name, for the error message.

    Returns:
        My rows, `[my items, dim]` float32.

    Raises:
        InputError: the features have fewer than `dim` independent directions.
    """
    mean = world.sum_(block.sum(0, dtype=torch.float64) / items.total)

    def centred() -> Iterator[torch.Tensor]:
        return (part.double() - mean for part in block.split(_ROWS))

    gram = torch.zeros(block.shape[1], block.shape[1], dtype=torch.float64)
    for rows in centred():
        gram.addmm_(rows.t(), rows)
    world.sum_(gram)
    norm = world.sum_(block.square().sum(dtype=torch.float64)).sqrt()
    squares, directions = torch.linalg.eigh(gram)
    # All ranks use rank 0's decomposition, since another machine might decompose the same matrix with other kernels.
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
    scale = largest.sign() / sigma[:dim] * (items.total / dim) ** 0.5
    return torch.cat([(rows @ (directions * scale)).float() for rows in centred()])
