"""Cross-entropy over a partitioned catalogue, with exact value and gradient; no rank holds another rank's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from distrec.parallel.partition import Partition
from distrec.parallel.world import World

_BLOCK_ELEMENTS = 1 << 22  # enough rows for an efficient product, yet little memory compared with the catalogue


class _FullSoftmax(torch.autograd.Function):
    """Computes the gradients in the forward pass, one block of rows at a time, so that scores need not be kept."""

    @staticmethod
    def forward(
        ctx: Any,
        vectors: torch.Tensor,
        catalogue: torch.Tensor,
        targets: torch.Tensor,
        counts: Sequence[int],
        items: Partition,
        world: World,
    ) -> torch.Tensor:
        everyone = world.gather_rows(vectors, counts)
        local = targets - items.start(world.rank)
        owned = (local >= 0) & (local < len(catalogue))
        vector_grad, catalogue_grad = torch.empty_like(everyone), torch.zeros_like(catalogue)
        losses = torch.empty(len(everyone), dtype=torch.float64)
        at_once = max(1, _BLOCK_ELEMENTS // items.block)  # the same on every rank: each block takes two reductions
        scores = everyone.new_empty(min(at_once, len(everyone)), len(catalogue))
        for start in range(0, len(everyone), at_once):
            rows = slice(start, min(start + at_once, len(everyone)))
            block, mine = everyone[rows], owned[rows].nonzero().squeeze(1)
            column = local[rows][mine]
            soft = torch.mm(block, catalogue.t(), out=scores[: len(block)])
            target = block.new_zeros(len(block))
            target[mine] = soft[mine, column]
            highest = world.max_(soft.amax(1) if len(catalogue) else block.new_full((len(block),), -torch.inf))
            soft.sub_(highest.unsqueeze(1)).exp_()
            total, target = world.sum_(torch.stack([soft.sum(1), target]))
            losses[rows] = total.log() + highest - target
            soft.div_(total.unsqueeze(1))
            soft[mine, column] -= 1
            torch.mm(soft, catalogue, out=vector_grad[rows])
            catalogue_grad.addmm_(soft.t(), block)
        ctx.save_for_backward(world.reduce_rows(vector_grad, counts), catalogue_grad)
        first = sum(counts[: world.rank])
        return losses[first : first + len(vectors)].sum().to(vectors.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        vector_grad, catalogue_grad = ctx.saved_tensors
        return vector_grad * grad, catalogue_grad * grad, None, None, None, None


def full_softmax(
    vectors: torch.Tensor,
    catalogue: torch.Tensor,
    targets: torch.Tensor,
    counts: Sequence[int],
    items: Partition,
    world: World,
) -> torch.Tensor:
    """My share of `sum_r [ log sum_i exp(<v_r, c_i>) - <v_r, c_t(r)> ]` over all ranks' rows r and all items i.

    The gradient is that of the sum over ranks, so a factor applied to the result must be the same on every rank.
    Collective: ranks exchange the vectors, their gradient, and three numbers per row. Memory holds one block of scores.

    Args:
        vectors: my rows v_r `[my rows, width]`.
        catalogue: my items' vectors c_i `[my items, width]`.
        targets: t(r), the item of every row of all ranks, in rank order `[rows]` int64, the same on every rank.
        counts: number of rows of each rank.
        items: the partition of the catalogue.
        world: the ranks.
    """
    share: torch.Tensor = _FullSoftmax.apply(vectors, catalogue, targets, counts, items, world)
    return share
