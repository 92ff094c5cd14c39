"""Item features as partitioned arrays: each rank reads its own rows and fills the missing ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from distrec.data.dataset import Dataset
from distrec.errors import InputError, StorageError
from distrec.parallel.partition import Partition
from distrec.parallel.world import World

Fill = Literal["mean", "zeros"]
Found = TypeVar("Found")


def feature_block(world: World, items: Partition, data: Dataset, name: str, fill: Fill) -> torch.Tensor:
    """My rows of feature set `name`, `[my items, width]` float32. Collective.

    Missing rows are filled with zeros or with the mean of the rows that all ranks have, summed in float64.
    """
    values, missing = _everywhere(world, lambda: data.feature_rows(name, *_mine(world, items)))
    if fill == "mean":
        sums = torch.from_numpy(np.append(values[~missing].sum(0, dtype=np.float64), float((~missing).sum())))
        world.sum_(sums)
        values[missing] = (sums[:-1] / sums[-1].clamp(min=1)).to(torch.float32).numpy()
    return torch.from_numpy(values)


@dataclass(frozen=True)
class TokenBlock:
    """My rows of a token set.

    Attributes:
        values: `[my items, tokens, width]` float16, as stored; zeros where a token is not real.
        mask: `[my items, tokens]` bool, True for real tokens. For an item without the modality, the first token (a zero
            vector) counts as real, since attention over no tokens is undefined; without `stand_in` it does not.
    """

    values: torch.Tensor
    mask: torch.Tensor


def token_block(world: World, items: Partition, data: Dataset, name: str, stand_in: bool = True) -> TokenBlock:
    """My rows of token set `name`. Collective."""
    values, count, _ = _everywhere(world, lambda: data.token_rows(name, *_mine(world, items)))
    mask = np.arange(values.shape[1]) < np.maximum(count, int(stand_in))[:, None]
    return TokenBlock(torch.from_numpy(values), torch.from_numpy(mask))


def _mine(world: World, items: Partition) -> tuple[int, int]:
    return items.start(world.rank), items.stop(world.rank)


def _everywhere(world: World, read: Callable[[], Found]) -> Found:
    """What `read` returns. If it refuses some rank's rows, all ranks raise that error, so none waits. Collective."""
    found, message = None, b""
    try:
        found = read()
    except StorageError:  # which a retry may fix
        raise
    except InputError as error:
        message = str(error).encode()
    length = int(world.max_(torch.tensor(len(message))))
    if length:
        mine = torch.tensor(list(message.ljust(length, b"\0")), dtype=torch.uint8).unsqueeze(0)
        told = [bytes(row.tolist()).rstrip(b"\0") for row in world.gather_rows(mine, [1] * world.size)]
        raise InputError(next(filter(None, told)).decode())
    return found  # type: ignore[return-value]  # no rank has a message, so `read` has returned


class _UnitRows(torch.autograd.Function):
    """Saves only the result and the norms. PyTorch's `normalize` also saves the input, and its backward is slower."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_(min=1e-12)
        unit = rows / norms
        ctx.save_for_backward(unit, norms)
        return unit

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        unit, norms = ctx.saved_tensors
        along = (grad * unit).sum(-1, keepdim=True)
        return torch.addcmul(grad, unit, along, value=-1).div_(norms)


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Each row (last dimension) divided by its L2 norm, with gradient; a zero row stays zero."""
    result: torch.Tensor = _UnitRows.apply(rows)
    return result
