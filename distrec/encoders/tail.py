"""The last layers of an encoder as a trainable module.

They turn the hidden states that `distrec encode --tokens --cut N` stores into the last hidden states, those that
`--tokens` alone would store.

In training mode, transformer layers use the dropout of their config. In EfficientNet, the statistics of each batch
normalisation are frozen and folded, with its scale and shift, into the weight and bias of the convolution before it,
which train. An item's output thus never depends on the other items of its batch.
"""

from __future__ import annotations

from math import isqrt
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional


class Tail(nn.Module):
    """Base of the last layers of an encoder: from `[items, tokens, width]` to the last layer's tokens and width."""

    recompute: ClassVar[bool] = True
    """With activation checkpointing, this module is computed again in the backward pass."""

    def forward(self, states: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the last hidden states.

        Args:
            states: hidden states before the last layers, `[items, tokens, width]`.
            real: which tokens are not padding, bool `[items, tokens]`. An item without real tokens lacks the modality.

        Returns:
            Last hidden states `[items, last tokens, last width]`, zeros for padding, and which tokens are real, bool
            `[items, last tokens]`. An item without real tokens gets one, its first, whose state is zero.
        """
        items = len(states)
        if not items:
            # A worker without items must still take part in the collectives for weights and gradients. Some layers
            # cannot run on an empty batch, so it runs on a dummy item.
            states, real = states.new_zeros(1, *states.shape[1:]), real.new_ones(1, real.shape[1])
        there = real.any(1, keepdim=True)
        # Attention over no token is undefined, so an item without real tokens attends to its first token.
        last, known = self.run(states, real | _first(real))
        known = known & there
        return (last * known.unsqueeze(2))[:items], (known | _first(known))[:items]

    def run(self, states: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward`, but every item has a real token, and states of padding may be any finite values."""
        raise NotImplementedError


class TransformerTail(Tail):
    """The last layers of a `transformers` model, and the normalisation after them, if there is one.

    The bias of the attention keys is removed. It adds the same number to all logits of a query, so softmax cancels it,
    and its gradient is only rounding error. Adam would turn that into full steps that depend on the number of workers.
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
    """The last blocks of a convolutional network. Its tokens are the cells of a square feature map, row by row.

    Args:
        blocks: the last blocks, in sequence.
        side: average the last map down to `side` x `side` tokens; None: keep all cells.
    """

    def __init__(self, blocks: nn.Sequential, side: int | None):
        super().__init__()
        self.blocks, self.side = blocks.requires_grad_(), side  # folding makes biases that require no gradient

    def run(self, states: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        height = isqrt(states.shape[1])
        maps = states.transpose(1, 2).unflatten(2, (height, height))
        last = map_tokens(self.blocks(maps), self.side)
        return last, real[:, :1].expand(-1, last.shape[1])


def map_tokens(maps: torch.Tensor, side: int | None) -> torch.Tensor:
    """Feature maps `[n, width, rows, columns]` as tokens `[n, 1 + cells, width]`: the mean, then the cells row by row.

    With `side`, the map is first averaged down to `side` x `side` cells.
    """
    cells = maps if side is None else functional.adaptive_avg_pool2d(maps, side)
    return torch.cat([maps.mean((2, 3)).unsqueeze(1), cells.flatten(2).transpose(1, 2)], 1)


def _first(real: torch.Tensor) -> torch.Tensor:
    """A mask of the first token, bool `[1, tokens]`."""
    return torch.arange(real.shape[1], device=real.device).unsqueeze(0) == 0


def split_transformer(model: Any, layers: str, norm: str | None, cut: int) -> Tail:
    """Cut the last `cut` layers off a `transformers` model, which then returns the hidden states before them.

    Args:
        model: the model, which is changed.
        layers: dotted attribute path of the model's layers.
        norm: dotted attribute path of the normalisation after them; None: there is none.
        cut: number of layers to cut off.

    Returns:
        The layers that were cut off and the normalisation, in evaluation mode.
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
