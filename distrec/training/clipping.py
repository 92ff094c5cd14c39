"""Clips the whole gradient, of tables and dense weights together, by its norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distrec.errors import NonFiniteLoss
from distrec.parallel.world import World

_CHUNK = 1 << 20  # number of elements converted to float64 at a time


@torch.no_grad()
def clip_gradients(
    world: World, parts: Sequence[torch.Tensor], replicas: Sequence[torch.Tensor], limit: float
) -> float:
    """Scale the gradients in place so that their joint L2 norm is at most `limit`. Collective.

    The factor is `min(1, limit / (norm + 1e-6))`, as in `torch.nn.utils.clip_grad_norm_`. The norm is the one that a
    single process would compute: squares are summed in float64 and reduced once, so all ranks use the same factor.

    Args:
        parts: gradients whose elements are each on one rank only (table rows, ZeRO partitions); any shapes.
        replicas: averaged gradients that are the same on every rank; they count once.
        limit: the largest allowed norm, above 0.

    Returns:
        The norm before scaling.

    Raises:
        NonFiniteLoss: the norm is NaN or infinite; nothing has been scaled.
    """
    counted = [*parts, *replicas] if world.rank == 0 else parts
    total = torch.zeros((), dtype=torch.float64)
    for grad in counted:
        for chunk in grad.flatten().split(_CHUNK):
            total += chunk.double().square().sum()
    norm = float(world.sum_(total).sqrt())
    if not norm < float("inf"):
        raise NonFiniteLoss(
            f"the gradient's norm is {norm} though the loss is finite; weights were not touched. Lower 'optimizer.lr' "
            "or check the features."
        )
    factor = limit / (norm + 1e-6)
    if factor < 1:
        for grad in (*parts, *replicas):
            grad.mul_(factor)
    return norm
