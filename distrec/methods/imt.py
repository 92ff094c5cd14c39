"""ODMT's dense module: it turns an item's tokens into three vectors, and histories of these into users' three vectors.

Section numbers in brackets refer to docs/methods/odmt.md. The module contains the projections (3.2), the IMT (3.3), the
networks (3.4) and the user encoders (3.5).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from distrec.methods.transformer import Block, SequenceEncoder

SOURCES = ("id", "text", "image")
"""The three predictors; their vectors are concatenated in this order."""


class IMT(nn.Module):
    """The ID-aware multimodal transformer over all tokens of one item (3.3).

    Args:
        layers: number of blocks, and of attention heads in each block.
        hide_id: version v1: text and image tokens cannot attend to the ID token, which attends to all tokens.
    """

    def __init__(self, dim: int, layers: int, dropout: float, hide_id: bool):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, layers, dropout) for _ in range(layers))
        self.dropout, self.hide_id = dropout, hide_id

    def forward(self, ids: torch.Tensor, text: torch.Tensor, image: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """The outputs for the ID token, the first text token and the first image token, `[items, 3, dim]`.

        Args:
            ids: the ID tokens `[items, 1, dim]`.
            text: the text tokens `[items, text tokens, dim]`.
            image: the image tokens `[items, image tokens, dim]`.
            real: which text and image tokens are not padding, bool `[items, text and image tokens]`.
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
        # Nothing reads the last block's outputs at other positions, so they are not computed.
        read: torch.Tensor = last(x, mask, [x.shape[1] - 1, 0, text.shape[1]])
        return read


class Branches(nn.Module):
    """Projections, the IMT, and for each source a two-layer network and a user encoder.

    Args:
        widths: widths of the ID table, the text tokens and the image tokens.
        dim: width of everything after the projections.
        length: number of items in a history.
        imt_layers: number of blocks of the IMT, and of attention heads in each block.
        user_layers, user_heads: numbers of blocks and heads of the user encoders.
        dropout: dropout rate of the IMT and of the user encoders.
        hide_id: see `IMT`.
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
        """Vectors of items, of users, or in a training step of both: weights are at hand during a call only.

        Args:
            items: ID rows `[items, width]`, text and image tokens `[items, tokens, width]` each, and which tokens are
                real, bool `[items, text and image tokens]`; None: no items.
            spread: turns my items' vectors into the columns that histories refer to, `[columns, 3 dim]`.
            histories: with items, the column of each input, int64 `[users, length]`; without items, the inputs
                themselves `[users, length, 3 dim]`; None: no users.
            real: which inputs are not padding, bool `[users, length]`.

        Returns:
            The items' vectors `[items, 3 dim]`, or what `spread` makes of them; and the encoding of each position of
            the histories and its past `[users, length, 3 dim]`, undefined where `real` is False.
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
