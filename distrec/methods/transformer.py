"""Transformer blocks over short sequences (Vaswani et al. 2017), in the form that recommenders use."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    """Multi-head attention without biases (docs/methods/odmt.md section 3.3).

    Args:
        dim: width of queries, keys and values; a multiple of `heads`.
        heads: number of attention heads.
        dropout: dropout rate of the attention weights and of the output.
    """

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.dropout = dropout

    def forward(self, x: torch.Tensor, mask: torch.Tensor, reads: slice | list[int] | None = None) -> torch.Tensor:
        """`[rows, read, dim]` from `x` `[rows, length, dim]`.

        Args:
            x: the inputs.
            mask: added to the logits, broadcast to `[rows, heads, length, length]`.
            reads: the positions whose outputs are computed; None: all.
        """
        asked = x if reads is None else x[:, reads]
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(asked), self.key(x), self.value(x))
        )
        if reads is not None and mask.shape[-2] > 1:
            mask = mask[..., reads, :]
        logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + mask
        weights = functional.dropout(logits.softmax(-1), self.dropout, self.training)
        mixed = (weights @ value).transpose(1, 2).flatten(2)
        return functional.dropout(self.out(mixed), self.dropout, self.training)


class Block(nn.Module):
    """Attention, then a feed-forward net of inner width 4 dim; both add their input and then normalise (post-norm)."""

    recompute: ClassVar[bool] = True
    """With activation checkpointing, its activations are recomputed in the backward pass."""

    def __init__(self, dim: int, heads: int, dropout: float, eps: float = 1e-6):
        super().__init__()
        self.attention = Attention(dim, heads, dropout)
        self.attention_norm = nn.LayerNorm(dim, eps=eps)
        self.inner, self.outer = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.feed_norm = nn.LayerNorm(dim, eps=eps)
        self.dropout = dropout

    def forward(self, x: torch.Tensor, mask: torch.Tensor, reads: slice | list[int] | None = None) -> torch.Tensor:
        """As `Attention.forward`."""
        attended = self.attention(x, mask, reads)
        x = self.attention_norm((x if reads is None else x[:, reads]) + attended)
        fed = self.outer(functional.relu(self.inner(x)))
        return self.feed_norm(x + functional.dropout(fed, self.dropout, self.training))


class SequenceEncoder(nn.Module):
    """A causal transformer over a left-padded history with learned positions (Kang & McAuley 2018).

    The form of the block is that of docs/methods/odmt.md section 3.5.

    Args:
        length: number of positions; the newest input is always at the last one.
    """

    def __init__(self, dim: int, length: int, layers: int, heads: int, dropout: float):
        super().__init__()
        self.positions = nn.Parameter(torch.empty(length, dim))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(layers))
        self.dropout = dropout
        nn.init.xavier_normal_(self.positions)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Each position's encoding of itself and its past, `[rows, length, dim]`; undefined where `real` is False.

        Args:
            x: inputs `[rows, length, dim]`.
            real: positions that hold an item, bool `[rows, length]`.
        """
        length = x.shape[1]
        past = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        # Not minus infinity: a position with nothing to attend to would become NaN; this makes its weights uniform.
        mask = torch.zeros((), dtype=x.dtype, device=x.device).where(past & real[:, None, None, :], -1e9)
        x = functional.dropout(self.norm(x + self.positions), self.dropout, self.training)
        for block in self.blocks:
            x = block(x, mask)
        return x
