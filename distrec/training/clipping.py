"""The norm of the whole gradient over tables and dense weights, and its clipping."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distrec.errors import NonFiniteLoss
from distrec.parallel.world import World

_CHUNK = 1 << 20  # elements taken to float64 at a time


@torch.no_grad()
def clip_gradients(
    world: World, parts: Sequence[torch.Tensor], replicas: Sequence[torch.Tensor], limit: float
) -> float:
    """Scale the gradients in place so that their joint L2 norm is at most `limit`; returns the norm before. Collective.

    The factor is `torch.nn.utils.clip_grad_norm_`'s, `min(1, limit / (norm + 1e-6))`, of the norm that one process would
    see: squares are added in float64 and reduced once, so every rank scales by the same number.

    Args:
        parts: gradients of which each element lies on one rank (table rows, ZeRO partitions); any shapes.
        replicas: averaged gradients that every rank holds alike; they count once.
        limit: above 0.

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
