"""The last layers of an encoder as a module that trains: from the hidden states that `distrec encode --tokens --cut N`
keeps to the last hidden states that `--tokens` keeps.

Transformer layers keep the dropout of their own config, in training mode. In EfficientNet the statistics of batch
normalisation are frozen and folded, with its scale and shift, into the weight and bias of the convolution before it,
which train: what an item becomes never depends on the others of its batch.
"""

from __future__ import annotations

from math import isqrt
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional


class Tail(nn.Module):
    """The last layers of one encoder: `[items, tokens, width]` to `[items, tokens of the last layer, its width]`."""

    recompute: ClassVar[bool] = True
    """With activation checkpointing, its inner values are computed anew for the backward pass."""

    def forward(self, states: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Last hidden states, zeros where they are not real, and where they are.

        Args:
            states: hidden states before the last layers `[items, tokens, width]`.
            real: tokens that are not padding, bool `[items, tokens]`; an item without any lacks the modality, and its
                first token, a zero vector, stands in as its only one.
        """
        items = len(states)
        if not items:
            # A worker without items takes part in every exchange of weights and gradients. Not every layer runs on no
            # item, so it gets a made-up one.
            states, real = states.new_zeros(1, *states.shape[1:]), real.new_ones(1, real.shape[1])
        there = real.any(1, keepdim=True)
        # Attention over no token at all has no value, so that such an item's first token stands in on the way, too.
        last, known = self.run(states, real | _first(real))
        known = known & there
        return (last * known.unsqueeze(2))[:items], (known | _first(known))[:items]

    def run(self, states: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward`, where every item has a real token; values of the others may be any finite ones."""
        raise NotImplementedError


class TransformerTail(Tail):
    """The last layers of a `transformers` model, and the normalisation that stands behind them, if one does.

    Their keys lose their bias: it adds the same to all of a query's logits, which softmax does not see, so that its
    gradient is rounding alone, of which Adam would make whole steps that differ by the number of workers.
    """

    def __init__(self, layers: nn.ModuleList, norm: nn.Module):
        super().__init__()
        self.layers, self.norm = layers, norm
        for name, module in layers.named_modules():
            if name.rpartition(".")[2] in ("key", "k_proj"):
                module.bias = None

    def run(self, states: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = states.new_zeros(()).where(real[:, None, None, :], torch.finfo(states.dtype).min)
        for layer in self.layers:
            states = layer(states, mask)
        return self.norm(states), real


class ConvolutionTail(Tail):
    """The last blocks of a convolutional network over its feature map, whose cells come as tokens, row by row.

    Args:
        side: the last map averaged down to `side` x `side` tokens.
    """

    def __init__(self, blocks: nn.Sequential, side: int | None):
        super().__init__()
        self.blocks, self.side = blocks.requires_grad_(), side  # biases from folding come without

    def run(self, states: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        height = isqrt(states.shape[1])
        maps = states.transpose(1, 2).unflatten(2, (height, height))
        last = map_tokens(self.blocks(maps), self.side)
        return last, real[:, :1].expand(-1, last.shape[1])


def map_tokens(maps: torch.Tensor, side: int | None) -> torch.Tensor:
    """Feature maps `[n, width, height, breadth]` as tokens `[n, 1 + cells, width]`: the mean, then the cells by rows.

    With `side`, the cells are those of the map averaged down to `side` x `side`.
    """
    cells = maps if side is None else functional.adaptive_avg_pool2d(maps, side)
    return torch.cat([maps.mean((2, 3)).unsqueeze(1), cells.flatten(2).transpose(1, 2)], 1)


def _first(real: torch.Tensor) -> torch.Tensor:
    """The first token of every item, bool `[1, tokens]`."""
    return torch.arange(real.shape[1], device=real.device).unsqueeze(0) == 0


def split_transformer(model: Any, layers: str, norm: str | None, cut: int) -> Tail:
    """Take the last `cut` layers off a `transformers` model, whose last hidden states then are those before them.

    Args:
        layers: where the model has its layers, dotted.
        norm: where it has the normalisation behind them; None: nowhere.
    """
    owner, name = _place(model, layers)
    stack = getattr(owner, name)
    setattr(owner, name, stack[:-cut])
    last: nn.Module = nn.Identity()
    if norm is not None:
        owner, name = _place(model, norm)
        last = getattr(owner, name)
        setattr(owner, name, nn.Identity())
    return TransformerTail(stack[-cut:], last).eval()


def _place(model: Any, dotted: str) -> tuple[Any, str]:
    owner, _, name = dotted.rpartition(".")
    return attrgetter(owner)(model) if owner else model, name
