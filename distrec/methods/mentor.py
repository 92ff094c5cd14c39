"""MENTOR (Xu et al., AAAI 2025). Section numbers in brackets refer to docs/methods/mentor.md.

Towers of text, image and IDs are propagated over users and items (3.2) and aligned by the first two moments of their
entries under the guidance of the ID tower (4.3). Two variants, which are two methods:

               `published`, the released program            `intent`, the paper
    mask term  a value without gradient (4.4)               trains its own layer and everything that E is computed from
    contrast   compares four towers that have their own     compares the image and text towers that rank, under two
               parameters; affects the ranking only          draws of noise; affects everything that E is computed
               through `weight` (4.5)                        from
    both       base-2 BPR (4.1), scalar moments (4.3), two hops whose layers are added without weights (3.2)

All towers are columns of one table and of one array, so that one hop is one exchange. The published program's unused
layers and its user-user graph (8) are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch.nn import functional

from distrec.config.bounds import MOST_LAYERS, MOST_NEIGHBOURS, MOST_WIDTH
from distrec.data.dataset import Dataset
from distrec.data.histories import Histories
from distrec.methods.base import Graph, Method, MethodConfig, Representations, require_features
from distrec.methods.batch import TripleBatch
from distrec.methods.losses import bpr
from distrec.methods.workspace import Workspace
from distrec.tables.features import Fill, unit_rows
from distrec.tables.spec import Side, Table, side_by_side, xavier_normal

CLEAN, NOISY = ["v", "t", "id"], ["v_n1", "t_n1", "v_n2", "t_n2"]
_SIDES: tuple[Side, Side] = ("user", "item")
_HIDDEN, _RADIUS = 256, 0.1


class Towers(torch.nn.Module):
    """The towers' two-layer encoders (3.2), and the layer of the mask branch, which may keep its initial values."""

    def __init__(self, widths: dict[str, int], dim: int, mask: Literal["none", "fixed", "trained"]):
        super().__init__()
        self.first = torch.nn.ModuleDict({name: torch.nn.Linear(width, _HIDDEN) for name, width in widths.items()})
        self.second = torch.nn.ModuleDict({name: torch.nn.Linear(_HIDDEN, dim) for name in widths})
        self.mask = torch.nn.Linear(2 * dim, 2 * dim) if mask != "none" else None
        if self.mask is not None and mask == "fixed":
            for name, parameter in list(self.mask.named_parameters()):
                delattr(self.mask, name)
                self.mask.register_buffer(name, parameter.detach())

    def forward(self, inputs: dict[str, torch.Tensor], names: Sequence[str]) -> torch.Tensor:
        """The towers `names` side by side, or the mask branch if `inputs` has the key "mask".

        Args:
            inputs: `[items, width]` of each source; or E under the key "mask" `[rows, 2 dim]`.
            names: the towers.

        Returns:
            `[items, towers x dim]`, or `[rows, 2 dim]` for the mask branch.
        """
        if self.mask is not None and "mask" in inputs:
            out: torch.Tensor = self.mask(inputs["mask"])
            return out
        hidden = (functional.leaky_relu(self.first[name](inputs[source(name)]), 0.01) for name in names)
        return torch.cat([self.second[name](rows) for name, rows in zip(names, hidden, strict=True)], 1)


def source(tower: str) -> str:
    """What a tower encodes: "v" (image), "t" (text) or "id"."""
    return tower.split("_")[0]


class Draws:
    """The random numbers of a step: the same at any number of workers."""

    def noise(self, space: Workspace, batch: TripleBatch, hop: int, side: Side, width: int) -> torch.Tensor:
        """Uniform in [0, 1) for every noisy tower's rows, `[my rows, width]`."""
        return space.uniform(side, width, batch.key("noise", hop))

    def keep(self, space: Workspace, batch: TripleBatch, side: Side, width: int, dropout: float) -> torch.Tensor:
        """1 where the feature mask keeps an entry, else 0, `[my rows, width]`."""
        return (space.uniform(side, width, batch.key("feature mask")) >= dropout).float()


class MENTOR(Method):
    """Scores are inner products of rows of E (3.4), which is an image half and a text half side by side."""

    class Config(MethodConfig):
        variant: Literal["published", "intent"] = Field(
            "published", description="published: what the released program computes; intent: what the paper describes"
        )
        image: str = Field("image", description="feature set of the image towers (3.2)")
        text: str = Field("text", description="feature set of the text towers (3.2)")
        fill: Fill = Field(
            "mean", description="vector of an item without a feature row: mean of the present rows, or zeros"
        )
        dim: int = Field(
            64, ge=1, le=MOST_WIDTH, description="d, width of one tower; E, which ranks, is twice as wide (3.4)"
        )
        item_layers: int = Field(
            1, ge=0, le=MOST_LAYERS, description="n_mm_layers, number of hops on the item graph S (3.4)"
        )
        knn_k: int = Field(
            10,
            ge=1,
            le=MOST_NEIGHBOURS,
            description="k, number of neighbours of an item in each modality's graph, itself included (3.3)",
        )
        image_weight: float = Field(
            0.1,
            ge=0,
            le=1,
            description="mm_image_weight, share of the image graph in S; the text graph has the rest (3.3)",
        )
        reg_weight: float = Field(1e-3, ge=0, description="lambda_r, weight of the L2 term (4.2)")
        align_weight: float = Field(0.1, ge=0, description="lambda_al, weight of moment alignment (4.3)")
        mask_weight_f: float = Field(
            1.5,
            ge=0,
            description="lambda_f, weight of the feature mask term; the term is a constant if 'variant' is published; "
            "0 leaves it out (4.4)",
        )
        mask_weight_g: float = Field(
            1e-3, ge=0, description="lambda_g, weight of the contrast of noisy towers; 0 leaves them out (4.5)"
        )
        dropout: float = Field(0.5, ge=0, lt=1, description="fraction of entries that the feature mask drops (4.4)")
        temperature: float = Field(0.2, ge=0.03, description="tau, temperature of the contrast of noisy towers (4.5)")
        stale_scores: bool = Field(
            False,
            description="rank by the E of the last training step, before its update, as the published program does (5)",
        )

    config: MENTOR.Config
    changeable = ("reg_weight", "align_weight", "dropout", "temperature")
    draws_dropout = ()  # its dropout is drawn by row number, so it is the same at any number of workers
    negatives_from = "train"

    def __init__(self, config: MENTOR.Config, data: Dataset):
        super().__init__(config, data)
        require_features(data, self.features(), "mentor")
        self.draws = Draws()
        self.intent = config.variant == "intent"
        self.noisy = config.mask_weight_g > 0
        self.towers = CLEAN + (NOISY if self.noisy and not self.intent else [])

    def features(self) -> list[str]:
        return [self.config.image, self.config.text]

    def title(self) -> str:
        return f"mentor ({self.config.variant})"

    def build(self, space: Workspace) -> None:
        super().build(space)
        config = self.config
        image, text = (space.features(name, config.fill) for name in self.features())
        self.inputs = {"v": image, "t": text}
        self.user_item = space.user_item()
        if config.stale_scores:
            self._stale = Representations(*(torch.zeros(space.my_count(side), 2 * config.dim) for side in _SIDES))
        nearest = [
            space.feature_neighbours(rows, name, config.fill, config.knn_k)
            for name, rows in zip(self.features(), (image, text), strict=True)
        ]
        weights = config.image_weight, 1 - config.image_weight
        self.item_item = space.item_graph(nearest, "uniform", weights)

    def tables(self) -> list[Table]:
        dim = self.config.dim
        towers = side_by_side([(name, xavier_normal) for name in self.towers])
        return [
            Table("preference", "user", dim * len(self.towers), towers),
            Table("id", "item", dim, xavier_normal),
            Table("weight", "user", 2, modality_weights),
        ]

    def dense(self) -> torch.nn.Module:
        widths = {"v": self.data.feature(self.config.image).width, "t": self.data.feature(self.config.text).width}
        widths["id"] = self.config.dim
        masked = self.config.mask_weight_f > 0
        widths = {name: widths[source(name)] for name in self.towers}
        return Towers(widths, self.config.dim, "none" if not masked else "trained" if self.intent else "fixed")

    def graphs(self) -> dict[str, Graph]:
        return {"user_item": self.user_item, "item_item": self.item_item}

    def views(self, batch: TripleBatch | None) -> Representations:
        """My rows of the towers after both graphs, side by side `[…, towers x dim]`.

        With a batch these are v, t, id and the noisy towers; without one, v and t.
        """
        names = self.towers if batch else CLEAN[:2]
        users, items = self._start(names)
        first = self.user_item.hop(users, items)
        if batch and self.noisy and self.intent:
            users, items, *first = (self._repeated(rows) for rows in (users, items, *first))  # type: ignore[assignment]
        self._perturb(batch, 0, *first)
        second = self.user_item.hop(*first)
        self._perturb(batch, 1, *second)
        users, items = ((zero + one).add_(two) for zero, one, two in zip((users, items), first, second, strict=True))
        neighbours = items
        for _ in range(self.config.item_layers):
            neighbours = self.item_item.times(neighbours)
        return Representations(users, items + neighbours if self.config.item_layers else 2 * items)

    def _start(self, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        dim, width = self.config.dim, self.config.dim * len(names)
        encoded = self.dense_module(self.inputs | {"id": self.block("id")}, names)
        both = (self.block("preference")[:, :width], encoded)
        users, items = (unit_rows(rows.view(-1, len(names), dim)) for rows in both)
        return users.view(-1, width), items.view(-1, width)

    def _repeated(self, rows: torch.Tensor) -> torch.Tensor:
        """Towers v, t and id, followed by v and t twice, which will be perturbed."""
        content = rows[:, : 2 * self.config.dim]
        return torch.cat([rows, content, content], 1)

    def _perturb(self, batch: TripleBatch | None, hop: int, users: torch.Tensor, items: torch.Tensor) -> None:
        """Add 0.1 sign(h) * rownorm(xi) to the noisy towers (3.2), in place: the derivative is the identity."""
        if batch is None or not self.noisy:
            return
        dim = self.config.dim
        with torch.no_grad():
            for side, rows in zip(_SIDES, (users, items), strict=True):
                noisy = rows[:, len(CLEAN) * dim :]
                noise = self.draws.noise(self.space, batch, hop, side, noisy.shape[1])
                noise = unit_rows(noise.view(-1, len(NOISY), dim)).view(noisy.shape)
                noisy.addcmul_(noisy.sign(), noise, value=_RADIUS)

    def final(self, views: Representations, first: int) -> Representations:
        """E (3.4) from tower `first` and the next one; each user has a weight for either tower."""
        dim = self.config.dim
        columns = slice(first * dim, (first + 2) * dim)
        weight = self.block("weight").repeat_interleave(dim, 1)
        return Representations(views.users[:, columns] * weight, views.items[:, columns])

    def representations(self, histories: Histories) -> Representations:
        if self.config.stale_scores and self._trained():
            return self._stale
        return self.final(self.views(None), 0)

    def kept(self) -> dict[str, tuple[Side, torch.Tensor]]:
        if not self.config.stale_scores:
            return {}
        return {"stale_user": ("user", self._stale.users), "stale_item": ("item", self._stale.items)}

    def _trained(self) -> bool:
        """Whether a training step has stored its E."""
        return self.space.any(self._stale.users.any() | self._stale.items.any())

    def loss(self, batch: TripleBatch) -> dict[str, torch.Tensor]:
        config, dim = self.config, self.config.dim
        views = self.views(batch)
        final = self.final(views, 0)
        if config.stale_scores:
            self._stale.users.copy_(final.users.detach())
            self._stale.items.copy_(final.items.detach())
        (users,) = batch.users.rows(final.users)
        (positives,) = batch.positives.rows(final.items)
        (negatives,) = batch.negatives.rows(final.items)
        (preferences,) = batch.users.rows(self.block("preference")[:, : 2 * dim])
        weights = self.block("weight")
        squares = preferences.square().sum() / (batch.size * dim)
        squares = squares + weights.square().sum() / (2 * self.space.count("user"))
        terms = {
            "bpr": batch.mean(bpr(users, positives, negatives)) / np.log(2),  # base-2 logarithm (4.1)
            "reg": config.reg_weight * squares,
            "align": config.align_weight * self.space.share(self.alignment(views, final)),
        }
        if self.noisy:
            one, two = self.final(views, 3), self.final(views, 5)
            user_nce = self.space.contrast(one.users, two.users, "user", config.temperature)
            item_nce = self.space.contrast(one.items, two.items, "item", config.temperature)
            terms |= {"nce_user": config.mask_weight_g * user_nce, "nce_item": config.mask_weight_g * item_nce}
        if config.mask_weight_f:
            terms["mask"] = config.mask_weight_f * self._mask(batch, final)
        return terms

    def moments(self, views: Representations, final: Representations) -> torch.Tensor:
        """Variance and mean over all entries of the tables E, ID (the guide), image and text (4.3), `[4, 2]`."""
        dim = self.config.dim
        v, t, guide = (
            (views.users[:, s], views.items[:, s]) for s in (slice(k * dim, (k + 1) * dim) for k in range(3))
        )
        # The last three tables contain their tower twice.
        return self.space.moments([(final.users, final.items), guide, v, t], [1, 2, 2, 2])

    def alignment(self, views: Representations, final: Representations) -> torch.Tensor:
        """Absolute differences of both moments, summed over the six pairs of tables; the same on every worker."""
        moments = self.moments(views, final)
        first, second = torch.triu_indices(4, 4, offset=1)
        return (moments[first] - moments[second]).abs().sum().float()

    def _mask(self, batch: TripleBatch, final: Representations) -> torch.Tensor:
        """My share of (1 - mean cos(drop(E), mlp(E))) over users plus the same over items (4.4)."""
        total = torch.zeros(())
        with torch.set_grad_enabled(self.intent):
            for side, rows in zip(_SIDES, (final.users, final.items), strict=True):
                keep = self.draws.keep(self.space, batch, side, rows.shape[1], self.config.dropout)
                dropped = rows * keep / (1 - self.config.dropout)
                mapped = self.dense_module({"mask": rows}, [])
                distances = 1 - functional.cosine_similarity(dropped, mapped, dim=1)
                total = total + distances.sum() / self.space.count(side)
        return total


def modality_weights(key: tuple[str | int, ...], rows: int, dim: int, start: int, stop: int) -> np.ndarray:
    """Initial values (3.5): Xavier normal with fan 2 + rows, softmax over each user's pair `[stop - start, 2]`."""
    draws = np.exp(xavier_normal(key, rows, dim, start, stop))
    out: np.ndarray = draws / draws.sum(1, keepdims=True)
    return out
