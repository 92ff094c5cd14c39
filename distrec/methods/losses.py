"""Loss terms that several methods share. Inputs are my rows; results are per row or my share of a sum."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from distrec.parallel.world import World

_BLOCK_ELEMENTS = 1 << 22  # enough rows for an efficient product, yet little memory compared with the inputs
_GRAM_ROWS = 256
_MIN_TEMPERATURE = 0.03


def bpr(users: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    """Bayesian personalised ranking, `-log sigmoid(<u, p> - <u, n>)` per row `[rows]` (Rendle et al. 2009)."""
    return functional.softplus((users * negatives).sum(1) - (users * positives).sum(1))


class _InfoNce(torch.autograd.Function):
    """Computes the gradients in the forward pass, one block of similarities at a time: memory is block x candidates."""

    @staticmethod
    def forward(
        ctx: Any, anchors: torch.Tensor, candidates: torch.Tensor, counts: torch.Tensor, first: int, temperature: float
    ) -> torch.Tensor:
        weights = counts[first : first + len(anchors)]
        positives = candidates[first : first + len(anchors)]
        anchor_grad = torch.empty_like(anchors)
        candidate_grad = torch.zeros_like(candidates)
        total = anchors.new_zeros((), dtype=torch.float64)
        # Rows have unit length, so no similarity exceeds 1: subtracting 1 replaces the search for the maximum. Shift,
        # temperature and counts enter through the product's operands, which saves passes over the large block.
        shift = counts.log() - 1 / temperature
        scaled, columns = anchors / temperature, candidates.t()
        own = (scaled * positives).sum(1)
        rows = min(max(1, _BLOCK_ELEMENTS // max(1, len(candidates))), len(anchors))
        similarities = anchors.new_empty(rows, len(candidates))
        for start in range(0, len(anchors), max(rows, 1)):
            block, weight = scaled[start : start + rows], weights[start : start + rows]
            soft = torch.addmm(shift, block, columns, out=similarities[: len(block)]).exp_()
            sums = soft.sum(1)
            total += (weight * (sums.log() + 1 / temperature - own[start : start + rows])).sum(dtype=torch.float64)
            scale = (weight / sums).unsqueeze(1)
            grad = anchor_grad[start : start + rows]
            torch.mm(soft, candidates, out=grad)
            grad.mul_(scale / temperature)
            candidate_grad.addmm_(soft.t(), block * scale)
        pull = (weights / temperature).unsqueeze(1)
        anchor_grad.addcmul_(pull, positives, value=-1)
        candidate_grad[first : first + len(anchors)].addcmul_(pull, anchors, value=-1)
        ctx.save_for_backward(anchor_grad, candidate_grad)
        return total.to(anchors.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        anchor_grad, candidate_grad = ctx.saved_tensors
        return anchor_grad * grad, candidate_grad * grad, None, None, None


def info_nce(
    anchors: torch.Tensor, candidates: torch.Tensor, counts: torch.Tensor, first: int, temperature: float
) -> torch.Tensor:
    """My share of `sum_k counts_k [ -a_k b_k / t + log sum_j counts_j exp(a_k b_j / t) ]` over rows of unit length.

    With distinct ids and their counts, this equals the sum over a batch in which repeated ids are repeated rows.

    Args:
        anchors: my anchors `[my rows, width]`, of unit length.
        candidates: `[rows, width]`, of unit length; row `first + k` is the positive of anchor k.
        counts: how often each row occurs in the batch, `[rows]`.
        first: the row of `candidates` that is the positive of my first anchor.
        temperature: t, at least 0.03; below that, exp underflows in float32.

    Raises:
        ValueError: the temperature is below 0.03.
    """
    if temperature < _MIN_TEMPERATURE:
        raise ValueError(f"temperature {temperature} is below {_MIN_TEMPERATURE}")
    result: torch.Tensor = _InfoNce.apply(anchors, candidates, counts, first, temperature)
    return result


class _GramDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: torch.Tensor, targets: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        # One product gives the difference of both Gram matrices: [V, T] [V, -T]^T = V V^T - T T^T. It is symmetric, so
        # only the blocks on and below the diagonal are computed, and those below it count twice.
        left, right = torch.cat([vectors, targets], 1), torch.cat([vectors, -targets], 1)
        blocks = [slice(start, start + _GRAM_ROWS) for start in range(0, len(vectors), _GRAM_ROWS)]
        pairs = [(row, column) for number, row in enumerate(blocks) for column in blocks[: number + 1]]
        grad, total = torch.zeros_like(vectors), vectors.new_zeros((), dtype=torch.float64)
        for row, column in pairs[rank::size]:
            difference = torch.mm(left[row], right[column].t())
            flat = difference.view(-1)
            total += torch.dot(flat, flat) * (1 if row == column else 2)
            grad[row].addmm_(difference, vectors[column])
            if row != column:
                grad[column].addmm_(difference.t(), vectors[row])
        ctx.save_for_backward(grad)
        return total.to(vectors.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (direction,) = ctx.saved_tensors
        return 4 * grad * direction, None, None, None


def gram_distance(vectors: torch.Tensor, targets: torch.Tensor, world: World) -> torch.Tensor:
    """My share of `|| V V^T - T T^T ||_F^2`; targets get no gradient.

    Args:
        vectors: V `[n, width]`, the same on every rank.
        targets: T `[n, target width]`, the same on every rank.
        world: the ranks that divide the work.
    """
    result: torch.Tensor = _GramDistance.apply(vectors, targets, world.rank, world.size)
    return result
