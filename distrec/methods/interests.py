"""A history decomposed into interests, in two views: the dense module of BiVRec.

Section numbers in brackets refer to docs/methods/bivrec.md.

`ClusterAttention` is the released prototype's block; `Patches` and `GaussianAttention` are the reconstruction's, and with
their switches off nothing of them is there.
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
    """Frozen features of items to content vectors (3): a linear map of each modality, then of both together.

    Args:
        widths: of the modalities' features, in order.
        mm_type: how two modalities are joined.
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
    """A history at several scales (4, B2): patches of p items, the newest item closing the last patch of each scale.

    A patch is `p / c sum_r W_r x_r` over its c real items, with W_r starting at I / p: their mean. Learned vectors of place
    and scale, starting at 0, are added. The scales' tokens stand one after another, each scale's newest one last.
    """

    def __init__(self, dim: int, length: int, scales: Sequence[int], positions: bool):
        super().__init__()
        self.scales = list(scales)
        self.patches = [-(-length // p) for p in self.scales]
        self.tokens = sum(self.patches)
        for p in self.scales:
            if p > 1:  # the module's own, not of a list's: ZeRO 3 gathers a module's own weights when it is called
                self.register_parameter(f"mix_{p}", nn.Parameter(torch.eye(dim).repeat(p, 1, 1) / p))
        self.place = nn.Parameter(torch.zeros(self.tokens, dim)) if positions else None
        self.scale = nn.Parameter(torch.zeros(len(self.scales), dim)) if positions else None

    def centres(self) -> torch.Tensor:
        """How many items before the newest one each token's middle lies `[tokens]`."""
        parts = [torch.arange(n - 1, -1, -1) * p + (p - 1) / 2 for p, n in zip(self.scales, self.patches, strict=True)]
        return torch.cat(parts)

    def forward(self, x: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[rows, tokens, dim]`, and which hold an item, from `[rows, length, dim]` and bool `[rows, length]`."""
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
    """Interests as Gaussian components that gather what lies near them before items are assigned (4, B3).

    By `feature`: near in the space of queries and keys. By `position`: near to a learned place in the history. Its last
    map starts at 0, so it changes nothing at first.
    """

    places: torch.Tensor

    def __init__(self, dim: int, interests: int, kind: Literal["feature", "position"], centres: torch.Tensor):
        super().__init__()
        self.kind = kind
        self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        if kind == "feature":
            self.query, self.key = (nn.Linear(dim, dim, bias=False) for _ in range(2))
            start = dim**0.25  # then 2 sigma^2 is 2 sqrt(dim): scaled dot products and a penalty on the key's norm
        else:
            start = float(centres.max() + 1) / interests
            self.centre = nn.Parameter(start * (torch.arange(interests) + 0.5))
        self.spread = nn.Parameter(torch.full((interests,), math.log(math.expm1(start - 1e-3))))
        self.register_buffer("places", centres, persistent=False)

    def forward(self, tokens: torch.Tensor, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Interest tokens `[rows, interests, dim]` from those before, `x` `[rows, tokens, dim]` and `real` `[rows, tokens]`."""
        if self.kind == "feature":
            query, key = self.query(tokens), self.key(x)
            # The squared distance without ||query||^2, which is the same for all items and leaves the softmax.
            distance = key.square().sum(-1).unsqueeze(1) - 2 * query @ key.transpose(1, 2)
        else:
            distance = (self.places - self.centre.unsqueeze(1)).square().expand(len(x), -1, -1)
        sigma = functional.softplus(self.spread) + 1e-3
        logits = -distance / (2 * sigma.square()).unsqueeze(1)
        there = real.unsqueeze(1)
        weights = logits.masked_fill(~there, _EXCLUDED).softmax(-1) * there  # without any item: nothing
        out: torch.Tensor = tokens + self.out(weights @ self.value(x))
        return out


class ClusterAttention(nn.Module):
    """Each item is assigned to its strongest interest, and each interest is the mean of its items (3; 4, B4).

    Args:
        gumbel: `open`: the assignment is a straight-through Gumbel softmax over interests; `close`: of the logits as they
            are. With `open`, the queries have no bias: it would shift an item's logits alike for all interests.
        tau: the softmax's temperature.
        shelter: interests that an item is assigned to.
        norm: `released` passes the weights through a second softmax over items; `groupvit` leaves them.
        padded_sums: places without an item count in an interest's number of items, as released.
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
            real: which of them are there, bool `[rows, items]`.
            noise: Gumbel draws to add to the logits, or none.
        """
        tokens, x = self.norm(tokens), self.norm(x)
        logits = self.query(tokens) @ self.key(x).transpose(1, 2) / math.sqrt(x.shape[-1])
        soft = ((logits if noise is None else logits + noise) / self.tau).softmax(1) if self.open else logits
        # Not an argmax: among equal values the two choose differently, and the published program has this one.
        hard = torch.zeros_like(soft).scatter_(1, soft.topk(self.shelter, 1).indices, 1.0)
        weights, there = hard - soft.detach() + soft, real.unsqueeze(1)
        weights = weights / ((weights if self.padded_sums else weights * there).sum(-1, keepdim=True) + 1)
        weights = weights.masked_fill(~there, _EXCLUDED).softmax(-1) if self.released else weights * there
        mixed = self.out(self._drop(weights) @ self.value(x))
        return self.norm_out(self._drop(mixed) + tokens), logits

    def _drop(self, values: torch.Tensor) -> torch.Tensor:
        return functional.dropout(values, self.dropout, self.training)


class View(nn.Module):
    """One view of a history: inputs, then interests.

    Args:
        patches: how the history becomes tokens.
        masked: places without an item are zero before the first norm.
        zero_tokens: interest tokens start at zero, as the released content view's do.
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
        """Interests `[rows, interests, dim]`, logits of the assignment `[rows, interests, tokens]`, which tokens are there.

        Args:
            x: items' vectors `[rows, length, dim]`, anything where there is none.
            real: bool `[rows, length]`.
            noise: `[rows, interests, tokens]` or none.
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
    """Both views, the norm that they share, and the heads of their pooled vectors.

    It is called with what to do, so that one call, in which ZeRO gathers the weights, can hold exchanges between workers.
    """

    target_weight: torch.Tensor
    target_bias: torch.Tensor

    def __init__(self, content: Content, views: Mapping[str, View], dim: int, dropout: float):
        super().__init__()
        self.content, self.views = content, nn.ModuleDict(views)
        self.norm = nn.LayerNorm(dim)
        self.heads = nn.ModuleDict({name: _head(dim, dropout) for name in views})
        # The readout's norm chooses an interest, without gradient: it never trains (3).
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

    def forward(self, work: Callable[[TwoViews], Any]) -> Any:
        """What `work` returns of this module."""
        return work(self)

    def interests(
        self, view: str, x: torch.Tensor, real: torch.Tensor, noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `View.forward`, normalised."""
        out, logits, real = self.views[view](x, real, noise)
        return self.norm(out), logits, real

    def pooled(self, view: str, interests: torch.Tensor) -> torch.Tensor:
        """One vector per history `[rows, dim]`."""
        out: torch.Tensor = self.heads[view](interests.mean(1))
        return out

    def readout(self, interests: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The interest nearest to the normalised target, `[rows, dim]`; the choice has no gradient."""
        with torch.no_grad():
            dim = targets.shape[-1:]
            target = functional.layer_norm(targets, dim, self.target_weight, self.target_bias)
            nearest = torch.einsum("rkd,rd->rk", interests, target).argmax(1)
        return interests[torch.arange(len(interests)), nearest]


def _head(dim: int, dropout: float) -> nn.Module:
    layers = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim), nn.Dropout(dropout)
    return nn.Sequential(*layers)
