"""ODMT's dense module: from an item's tokens to its three vectors, and from histories of them to a user's three.

Section numbers in brackets refer to docs/methods/odmt.md. Projections (3.2), IMT (3.3), networks
(3.4) and user encoders (3.5) are here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from distrec.methods.transformer import Block, SequenceEncoder

SOURCES = ("id", "text", "image")
"""The three predictors; their vectors stand beside each other in this order."""


class IMT(nn.Module):
    """The ID-aware multimodal transformer over all tokens of one item (3.3).

    Args:
        layers: blocks, and heads of each.
        hide_id: version v1: texts' and images' tokens cannot see the ID's, which sees everything.
    """

    def __init__(self, dim: int, layers: int, dropout: float, hide_id: bool):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, layers, dropout) for _ in range(layers))
        self.dropout, self.hide_id = dropout, hide_id

    def forward(self, ids: torch.Tensor, text: torch.Tensor, image: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """What ID, first text and first image token have become, `[items, 3, dim]`.

        Args:
            ids: `[items, 1, dim]`.
            text: `[items, text tokens, dim]`.
            image: `[items, image tokens, dim]`.
            real: texts' and images' tokens that are not padding, bool `[items, text and image tokens]`.
        """
        x = torch.cat([text, image, ids], 1)
        seen = functional.pad(real, (0, 1), value=True)[:, None, None, :]
        if self.hide_id:
            cut = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
            cut[:-1, -1] = False
            seen = seen & cut
        mask = torch.zeros((), dtype=x.dtype, device=x.device).where(seen, -1e4)
        x = functional.dropout(x, self.dropout, self.training)
        *first, last = self.blocks
        for block in first:
            x = block(x, mask)
        # Nobody reads the other positions of the last block, so it computes none of them.
        read: torch.Tensor = last(x, mask, [x.shape[1] - 1, 0, text.shape[1]])
        return read


class Branches(nn.Module):
    """Projections, IMT, and of each source a two-layer net and a user encoder.

    Args:
        widths: of the ID table, the text tokens and the image tokens.
        imt_layers, user_layers, user_heads: of IMT and of the user encoders.
    """

    def __init__(
        self,
        widths: tuple[int, int, int],
        dim: int,
        length: int,
        imt_layers: int,
        user_layers: int,
        user_heads: int,
        dropout: float,
        hide_id: bool,
    ):
        super().__init__()
        self.project = nn.ModuleDict({name: nn.Linear(width, dim) for name, width in zip(SOURCES, widths, strict=True)})
        self.imt = IMT(dim, imt_layers, dropout, hide_id)
        self.nets = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(dim, dim), nn.LeakyReLU(), nn.Linear(dim, dim)) for name in SOURCES}
        )
        self.users = nn.ModuleDict(
            {name: SequenceEncoder(dim, length, user_layers, user_heads, dropout) for name in SOURCES}
        )

    def forward(
        self,
        items: tuple[torch.Tensor, ...] | None = None,
        *,
        spread: Callable[[torch.Tensor], torch.Tensor] | None = None,
        histories: torch.Tensor | None = None,
        real: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Items' vectors, users' vectors, or in a training step both, since ZeRO wants one call of a module per step.

        Args:
            items: ID rows `[items, width]`, text and image tokens `[items, tokens, width]`, and which of them are real,
                bool `[items, text and image tokens]`; None: no items.
            spread: from my items' vectors to the columns that histories refer to, `[columns, 3 dim]`.
            histories: with items, the column of each input, int64 `[users, length]`; without, the inputs themselves
                `[users, length, 3 dim]`; None: no users.
            real: inputs that are not padding, bool `[users, length]`.

        Returns:
            Columns `[items, 3 dim]`, as `spread` returns them, and what each position of the histories has seen,
            `[users, length, 3 dim]`, undefined where `real` is False.
        """
        columns = None
        if items is not None:
            columns = self._items(*items)
            columns = columns if spread is None else spread(columns)
            histories = None if histories is None else columns[histories]
        if histories is None:
            return columns, None
        parts = zip(self.users.values(), histories.chunk(len(SOURCES), -1), strict=True)
        return columns, torch.cat([encoder(part, real) for encoder, part in parts], -1)

    def _items(self, ids: torch.Tensor, text: torch.Tensor, image: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        tokens = (self.project[name](x) for name, x in zip(SOURCES, (ids.unsqueeze(1), text, image), strict=True))
        mixed = self.imt(*tokens, real)
        return torch.cat([net(mixed[:, place]) for place, net in enumerate(self.nets.values())], 1)
