"""Polynomials of a graph operator, the common form of the propagations of all graph methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Weight = float | torch.Tensor


def polynomial(
    hop: Callable[..., tuple[torch.Tensor, ...]], weights: Sequence[Weight], *x: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """`sum_l weights[l] hop^l(x)`; no gradient.

    Args:
        hop: a linear map of one or several arrays that returns new arrays.
        weights: the weights of the powers 0 to L; a tensor `[width]` gives each column its own weight.
        x: the arrays `[rows, width]`.
    """
    # Horner's rule keeps one running sum. Keeping each power and the sum would put a third array into the caches.
    sums = tuple(part * weights[-1] for part in x)
    for weight in reversed(weights[:-1]):
        sums = tuple(_add(following, part, weight) for following, part in zip(hop(*sums), x, strict=True))
    return sums


def _add(to: torch.Tensor, part: torch.Tensor, weight: Weight) -> torch.Tensor:
    return to.addcmul_(part, weight) if isinstance(weight, torch.Tensor) else to.add_(part, alpha=weight)


def mean_of_powers(layers: int) -> list[Weight]:
    """The weights of LightGCN's mean over the input and `layers` hops."""
    return [1 / (layers + 1)] * (layers + 1)


def decaying_powers(decay: torch.Tensor, layers: int, dtype: torch.dtype = torch.float32) -> list[Weight]:
    """The weights `(1 - c) / (1 - c^(L+1)) c^l`, which sum to 1, for a decay `c` in (0, 1) of each column `[width]`.

    They form a truncated Neumann series (docs/methods/stair.md section 3.2). They are computed in float64, since 1 - c
    can be as small as 1e-3.
    """
    c = decay.double()
    scale = (1 - c) / (1 - c ** (layers + 1))
    return [(scale * c**power).to(dtype) for power in range(layers + 1)]
