"""One autograd node for a linear map that is given together with its adjoint.

Exchanges of rows, sparse products and propagations over several hops are linear, so their backward pass is their
adjoint. As each of them is one node, autograd neither records nor stores the steps inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Map = Callable[..., Any]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, apply: Map, adjoint: Map, *inputs: torch.Tensor) -> Any:
        ctx.adjoint = adjoint
        ctx.single = len(inputs) == 1
        return apply(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        back = ctx.adjoint(*grads)
        return (None, None, back) if ctx.single else (None, None, *back)


def linear(x: torch.Tensor, apply: Map, adjoint: Map) -> torch.Tensor:
    """`apply(x)`; the gradient of `x` is `adjoint` of the output's gradient."""
    return _Linear.apply(apply, adjoint, x)


def linear_pair(x: torch.Tensor, y: torch.Tensor, apply: Map, adjoint: Map) -> tuple[torch.Tensor, torch.Tensor]:
    """`apply(x, y)`, a pair; the gradients of `x` and `y` are `adjoint` of the two output gradients."""
    return _Linear.apply(apply, adjoint, x, y)
