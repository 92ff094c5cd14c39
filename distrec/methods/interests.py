"""The dense module of BiVRec: it decomposes a history into interests, in two views.

Section numbers in brackets refer to docs/methods/bivrec.md.

`ClusterAttention` is a block of the released prototype. `Patches` and `GaussianAttention` belong to the reconstruction;
when their settings switch them off, they have no weights and no effect. `allocation_distance` is the reconstruction's
term that compares the two views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

_EXCLUDED = -(2.0**32) + 1
_STD = 0.02


class Content(nn.Module):
    """Maps items' frozen features to content vectors (3): one linear map per modality, then one of both together.

    Args:
        widths: widths of the modalities' features, in order.
        dim: width of the content vectors.
        mm_type: `concat`: two modalities are joined by a further linear map; `sum`: they are added.
    """

    def __init__(self, widths: Sequence[int], dim: int, mm_type: Literal["concat", "sum"]):
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(width, dim) for width in widths)
        self.both = nn.Linear(2 * dim, dim) if len(widths) == 2 and mm_type == "concat" else None

    def forward(self, *features: torch.Tensor) -> torch.Tensor:
        """`[items, dim]` from `[items, width]` of each modality."""
        parts = [layer(rows) for layer, rows in zip(self.each, features, strict=True)]
        return sum(parts[1:], parts[0]) if self.both is None else self.both(torch.cat(parts, 1))


class Patches(nn.Module):
    """Cuts a history into patches of several sizes (4, B2); at each size p, the last patch ends with the newest item.

    The token of a patch is `p / c sum_r W_r x_r` over its c real items. Each W_r starts as I / p, which makes the token
    the mean of its items. Learned vectors of place and size, which start at 0, are added. The tokens of the sizes
    follow one another, and the newest token of each size comes last.

    Args:
        dim: width of items and tokens.
        length: number of places in a history.
        scales: the sizes p.
        positions: whether to add vectors of place and size.
    """

    def __init__(self, dim: int, length: int, scales: Sequence[int], positions: bool):
        super().__init__()
        self.scales = list(scales)
        self.patches = [-(-length // p) for p in self.scales]
        self.tokens = sum(self.patches)
        for p in self.scales:
            if p > 1:  # a parameter of this module, not of a list: at a call, a module's own weights are at hand
                self.register_parameter(f"mix_{p}", nn.Parameter(torch.eye(dim).repeat(p, 1, 1) / p))
        self.place = nn.Parameter(torch.zeros(self.tokens, dim)) if positions else None
        self.scale = nn.Parameter(torch.zeros(len(self.scales), dim)) if positions else None

    def centres(self) -> list[float]:
        """Distance from each token's centre to the newest item, in items `[tokens]`."""
        return [
            place * p + (p - 1) / 2
            for p, n in zip(self.scales, self.patches, strict=True)
            for place in range(n - 1, -1, -1)
        ]

    def forward(self, x: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[rows, tokens, dim]`, and which of them hold an item, bool `[rows, tokens]`.

        Args:
            x: items' vectors `[rows, length, dim]`.
            real: which places hold an item, bool `[rows, length]`.
        """
        parts, there = [], []
        for p, n in zip(self.scales, self.patches, strict=True):
            if p == 1:
                parts.append(x)
                there.append(real)
                continue
            missing = n * p - x.shape[1]
            patch = functional.pad(x * real.unsqueeze(-1), (0, 0, missing, 0)).unflatten(1, (n, p))
            count = functional.pad(real, (missing, 0)).unflatten(1, (n, p)).sum(-1)
            mixed = patch.flatten(2) @ getattr(self, f"mix_{p}").transpose(1, 2).flatten(0, 1)
            parts.append(mixed * (p / count.clamp(min=1)).unsqueeze(-1))
            there.append(count > 0)
        out = torch.cat(parts, 1)
        if self.place is not None and self.scale is not None:
            out = out + self.place + self.scale.repeat_interleave(torch.tensor(self.patches), 0)
        return out, torch.cat(there, 1)


class GaussianAttention(nn.Module):
    """Lets interests, as Gaussian components, attend to nearby items before items are assigned to them (4, B3).

    `feature`: nearby in the space of queries and keys. `position`: near a learned place in the history. The last linear
    map starts at 0, so that the block has no effect at first.

    Args:
        dim: width of tokens and items.
        interests: number of interests.
        kind: `feature` or `position`.
        centres: distance of each token from the newest item, in items `[tokens]`.
    """

    places: torch.Tensor

    def __init__(self, dim: int, interests: int, kind: Literal["feature", "position"], centres: Sequence[float]):
        super().__init__()
        self.kind = kind
        self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        if kind == "feature":
            self.query, self.key = (nn.Linear(dim, dim, bias=False) for _ in range(2))
            start = dim**0.25  # so 2 sigma^2 = 2 sqrt(dim): scaled dot products with a penalty on the key's norm
        else:
            start = (max(centres) + 1) / interests
            self.centre = nn.Parameter(start * (torch.arange(interests) + 0.5))
        self.spread = nn.Parameter(torch.full((interests,), math.log(math.expm1(start - 1e-3))))
        self.register_buffer("places", torch.tensor(centres, dtype=torch.float32), persistent=False)

    def forward(self, tokens: torch.Tensor, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Updated interest tokens `[rows, interests, dim]`.

        Args:
            tokens: interest tokens `[rows, interests, dim]`.
            x: items' tokens `[rows, tokens, dim]`.
            real: which of these hold an item, bool `[rows, tokens]`.
        """
        if self.kind == "feature":
            query, key = self.query(tokens), self.key(x)
            # The squared distance without ||query||^2, which is the same for all items and cancels in the softmax.
            distance = key.square().sum(-1).unsqueeze(1) - 2 * query @ key.transpose(1, 2)
        else:
            distance = (self.places - self.centre.unsqueeze(1)).square().expand(len(x), -1, -1)
        sigma = functional.softplus(self.spread) + 1e-3
        logits = -distance / (2 * sigma.square()).unsqueeze(1)
        there = real.unsqueeze(1)
        weights = logits.masked_fill(~there, _EXCLUDED).softmax(-1) * there  # all zero if there is no item
        out: torch.Tensor = tokens + self.out(weights @ self.value(x))
        return out


class ClusterAttention(nn.Module):
    """Assigns each item to its strongest interests; each interest becomes the mean of its items (3; 4, B4).

    Args:
        dim: width of interests and items.
        gumbel: `open`: the assignment is a straight-through Gumbel softmax over interests; `close`: it uses the logits
            directly. With `open`, queries have no bias, which would add the same number to all logits of an item.
        tau: temperature of the softmax.
        shelter: number of interests to which an item is assigned.
        norm: `released`: the weights pass through a second softmax over items; `groupvit`: they do not.
        padded_sums: whether places without an item are included in an interest's number of items, as released.
        dropout: dropout rate of the weights and of the output.
    """

    def __init__(
        self,
        dim: int,
        gumbel: Literal["open", "close"],
        tau: float,
        shelter: int,
        norm: Literal["released", "groupvit"],
        padded_sums: bool,
        dropout: float,
    ):
        super().__init__()
        self.norm, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim, bias=gumbel == "close")
        self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(3))
        self.open, self.tau, self.shelter = gumbel == "open", tau, shelter
        self.released, self.padded_sums, self.dropout = norm == "released", padded_sums, dropout

    def forward(
        self, tokens: torch.Tensor, x: torch.Tensor, real: torch.Tensor, noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Interests `[rows, interests, dim]`, and the logits of the assignment `[rows, interests, items]`.

        Args:
            tokens: interest tokens `[rows, interests, dim]`.
            x: items `[rows, items, dim]`.
            real: which of them are not padding, bool `[rows, items]`.
            noise: Gumbel noise to add to the logits `[rows, interests, items]`, or None.
        """
        tokens, x = self.norm(tokens), self.norm(x)
        logits = self.query(tokens) @ self.key(x).transpose(1, 2) / math.sqrt(x.shape[-1])
        soft = ((logits if noise is None else logits + noise) / self.tau).softmax(1) if self.open else logits
        # `topk`, not `argmax`: they choose differently among equal values, and the published program uses `topk`.
        hard = torch.zeros_like(soft).scatter_(1, soft.topk(self.shelter, 1).indices, 1.0)
        weights, there = hard - soft.detach() + soft, real.unsqueeze(1)
        weights = weights / ((weights if self.padded_sums else weights * there).sum(-1, keepdim=True) + 1)
        weights = weights.masked_fill(~there, _EXCLUDED).softmax(-1) if self.released else weights * there
        mixed = self.out(self._drop(weights) @ self.value(x))
        return self.norm_out(self._drop(mixed) + tokens), logits

    def _drop(self, values: torch.Tensor) -> torch.Tensor:
        return functional.dropout(values, self.dropout, self.training)


class View(nn.Module):
    """One view of a history, which maps items' vectors to interests.

    Args:
        dim: width of items and interests.
        interests: number of interests.
        patches: turns the history into tokens.
        gaussian: attention before the assignment, or None.
        cluster: the assignment.
        masked: whether places without an item are set to zero before the first norm.
        zero_tokens: whether interest tokens start at zero, as those of the released content view do.
        dropout: dropout rate of the inputs.
    """

    def __init__(
        self,
        dim: int,
        interests: int,
        patches: Patches,
        gaussian: GaussianAttention | None,
        cluster: ClusterAttention,
        masked: bool,
        zero_tokens: bool,
        dropout: float,
    ):
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(interests, dim))
        if not zero_tokens:
            nn.init.trunc_normal_(self.tokens, std=_STD)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.patches, self.gaussian, self.cluster = patches, gaussian, cluster
        self.masked, self.dropout = masked, dropout

    def forward(
        self, x: torch.Tensor, real: torch.Tensor, noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Interests `[rows, interests, dim]`, logits of the assignment, and which tokens hold an item.

        Args:
            x: items' vectors `[rows, length, dim]`, arbitrary where there is no item.
            real: which places hold an item, bool `[rows, length]`.
            noise: Gumbel noise `[rows, interests, tokens]`, or None.

        Returns:
            The interests, the logits `[rows, interests, tokens]`, and bool `[rows, tokens]`.
        """
        if self.masked:
            x = x * real.unsqueeze(-1)
        x, real = self.patches(x, real)
        x = functional.dropout(self.norm(x), self.dropout, self.training)
        tokens = self.tokens.expand(len(x), -1, -1)
        if self.gaussian is not None:
            tokens = self.gaussian(tokens, x, real)
        out, logits = self.cluster(tokens, x, real, noise)
        return out, logits, real


class TwoViews(nn.Module):
    """Both views, the norm that they share, and the heads for their pooled vectors.

    A call takes the function to run, because weights are at hand during a call only. The function may use several parts
    of the module, with exchanges between workers in between.
    """

    target_weight: torch.Tensor
    target_bias: torch.Tensor

    def __init__(self, content: Content, views: Mapping[str, View], dim: int, dropout: float):
        super().__init__()
        self.content, self.views = content, nn.ModuleDict(views)
        self.norm = nn.LayerNorm(dim)
        self.heads = nn.ModuleDict({name: _head(dim, dropout) for name in views})
        # The norm of the readout only selects an interest, without gradient, so it never trains (3).
        self.register_buffer("target_weight", torch.ones(dim))
        self.register_buffer("target_bias", torch.zeros(dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for view in views.values():
            if view.gaussian is not None:
                nn.init.zeros_(view.gaussian.out.weight)

    @property
    def tokens(self) -> int:
        """The number of tokens of a history."""
        view: Any = self.views["id"]
        return int(view.patches.tokens)

    def forward(self, work: Callable[[TwoViews], Any]) -> Any:
        """The result of `work` on this module."""
        return work(self)

    def interests(
        self, view: str, x: torch.Tensor, real: torch.Tensor, noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `View.forward` of one view, with the interests normalised."""
        out, logits, real = self.views[view](x, real, noise)
        return self.norm(out), logits, real

    def pooled(self, view: str, interests: torch.Tensor) -> torch.Tensor:
        """One vector per history `[rows, dim]`, from its interests `[rows, interests, dim]`."""
        out: torch.Tensor = self.heads[view](interests.mean(1))
        return out

    def readout(self, interests: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The interest with the largest inner product with the normalised target; the choice has no gradient.

        Args:
            interests: `[rows, interests, dim]`.
            targets: target vectors `[rows, dim]`.

        Returns:
            `[rows, dim]`.
        """
        with torch.no_grad():
            dim = targets.shape[-1:]
            target = functional.layer_norm(targets, dim, self.target_weight, self.target_bias)
            nearest = torch.einsum("rkd,rd->rk", interests, target).argmax(1)
        return interests[torch.arange(len(interests)), nearest]


def _head(dim: int, dropout: float) -> nn.Module:
    layers = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim), nn.Dropout(dropout)
    return nn.Sequential(*layers)


def allocation_distance(
    first: torch.Tensor, second: torch.Tensor, there: torch.Tensor, kind: Literal["co_allocation", "aligned"]
) -> torch.Tensor:
    """Distance between the allocations of tokens to interests in two views (4, B7), `[rows]`.

    `co_allocation`: each view gives the probability that two tokens belong to the same interest; the distance is the
    mean squared difference over pairs of tokens. It does not depend on how interests are numbered. `aligned`: the
    symmetric KL divergence between the views, averaged over tokens. Rows with too few tokens have distance 0.

    Args:
        first, second: log-probabilities over interests in either view `[rows, interests, tokens]`.
        there: which tokens hold an item, bool `[rows, tokens]`.
        kind: which of the two distances.
    """
    if kind == "aligned":
        divergence = ((first.exp() - second.exp()) * (first - second)).sum(1) / 2
        return (divergence * there).sum(1) / there.sum(1).clamp(min=1)
    one, other = (logs.exp().transpose(1, 2) @ logs.exp() for logs in (first, second))
    pairs = there.unsqueeze(1) & there.unsqueeze(2) & ~torch.eye(there.shape[1], dtype=torch.bool)
    return ((one - other).square() * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)
