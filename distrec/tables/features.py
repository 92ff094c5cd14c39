"""Item features as partitioned arrays: my rows only, with the fill rule for missing ones."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from distrec.data.dataset import Dataset
from distrec.parallel.partition import Partition
from distrec.parallel.world import World

Fill = Literal["mean", "zeros"]


def feature_block(world: World, items: Partition, data: Dataset, name: str, fill: Fill) -> torch.Tensor:
    """My rows of feature set `name`, `[my items, width]` float32; missing rows hold the mean of the present ones, or zeros.

    Collective: the mean is over all ranks' rows, summed in float64.
    """
    values, missing = data.feature_rows(name, items.start(world.rank), items.stop(world.rank))
    if fill == "mean":
        sums = torch.from_numpy(np.append(values[~missing].sum(0, dtype=np.float64), float((~missing).sum())))
        world.sum_(sums)
        values[missing] = (sums[:-1] / sums[-1].clamp(min=1)).to(torch.float32).numpy()
    return torch.from_numpy(values)


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Each row divided by its L2 norm; a zero row stays zero."""
    return torch.nn.functional.normalize(rows, dim=1, eps=1e-12)
