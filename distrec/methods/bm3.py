"""BM3 (Zhou et al., WWW 2023): bootstrapped latent representations, without negatives.

Propagated vectors and projected content predict copies of themselves and of each other from which entries are dropped.
Section numbers in brackets refer to docs/methods/bm3.md.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch.nn.functional import cosine_similarity

from distrec.config.bounds import MOST_LAYERS, MOST_WIDTH
from distrec.data.dataset import Dataset
from distrec.data.histories import Histories
from distrec.graph.polynomial import mean_of_powers
from distrec.methods.base import Graph, Method, MethodConfig, Representations, require_features
from distrec.methods.batch import PairBatch
from distrec.methods.workspace import Workspace
from distrec.tables.features import Fill
from distrec.tables.spec import Side, Table


class Heads(torch.nn.Module):
    """The predictor, and a projection of each feature set (2)."""

    def __init__(self, widths: list[int], dim: int):
        super().__init__()
        self.predictor = torch.nn.Linear(dim, dim)
        self.projections = torch.nn.ModuleList(torch.nn.Linear(width, dim) for width in widths)
        for layer in (self.predictor, *self.projections):
            torch.nn.init.xavier_normal_(layer.weight)

    def forward(self, predicted: list[torch.Tensor], projected: list[torch.Tensor]) -> list[torch.Tensor]:
        """The predictions from some vectors `[…, dim]`, and the projections of each set's rows `[…, width]`."""
        projections = (net(rows) for net, rows in zip(self.projections, projected, strict=False))
        return [*map(self.predictor, predicted), *projections]


class BM3(Method):
    """Scores are inner products of the predictions from both sides' vectors (5)."""

    class Config(MethodConfig):
        features: list[str] = Field(["text", "image"], description="feature sets, whose vectors train (2)")
        fill: Fill = Field(
            "mean", description="vector of an item without a feature row: mean of the present rows, or zeros"
        )
        dim: int = Field(64, ge=1, le=MOST_WIDTH, description="d, width of all vectors (2)")
        layers: int = Field(1, ge=0, le=MOST_LAYERS, description="L, number of hops on the user-item graph (2)")
        dropout: float = Field(0.3, ge=0, lt=1, description="p, fraction of a target's entries that are dropped (3)")
        cl_weight: float = Field(2.0, ge=0, description="weight of the alignment of contents; 1 in the paper (4)")
        reg_weight: float = Field(0.1, ge=0, description="lambda, weight of the norms of all vectors (4)")

    config: BM3.Config
    changeable = ("dropout", "cl_weight", "reg_weight")
    draws_dropout = ()  # its dropout is drawn by row number, so it is the same at any number of workers
    negatives_from = "nothing"

    def __init__(self, config: BM3.Config, data: Dataset):
        super().__init__(config, data)
        require_features(data, config.features, "bm3")

    def features(self) -> list[str]:
        return self.config.features

    def tables(self) -> list[Table]:
        dim = self.config.dim
        contents = [self.trained_features(name) for name in self.config.features]
        return [Table("user", "user", dim), Table("item", "item", dim), *contents]

    def dense(self) -> torch.nn.Module:
        return Heads([self.data.feature(name).width for name in self.config.features], self.config.dim)

    def build(self, space: Workspace) -> None:
        super().build(space)
        self.user_item = space.user_item(*space.distinct_pairs())

    def graphs(self) -> dict[str, Graph]:
        return {"user_item": self.user_item}

    def vectors(self) -> Representations:
        """My rows of h_u and of h_i, to which the item's own vector is added (2)."""
        ids = self.block("user"), self.block("item")
        users, items = self.user_item.propagate(*ids, mean_of_powers(self.config.layers))
        return Representations(users, items + ids[1])

    def representations(self, histories: Histories) -> Representations:
        found = self.vectors()
        return Representations(*self.dense_module([found.users, found.items], []))

    def loss(self, batch: PairBatch) -> dict[str, torch.Tensor]:
        config, names, found = self.config, self.config.features, self.vectors()
        contents = self.dense_module([], [self.block(name) for name in names])
        online = [found.users, found.items, *contents]
        targets = [self._dropped(batch, rows.detach(), number) for number, rows in enumerate(online)]
        user, user_target = batch.users.rows(online[0], targets[0])
        item, *content = batch.positives.rows(*online[1:])
        item_target, *content_targets = batch.positives.rows(*targets[1:])
        user, item, *content = self.dense_module([user, item, *content], [])
        squares = torch.stack([found.users.square().sum(), found.items.square().sum()])
        norms = self.space.total(squares).clamp(min=1e-30).sqrt().sum()  # the clamp: a root of 0 has no derivative
        return {
            "ui": batch.mean(apart(user, item_target)) + batch.mean(apart(item, user_target)),
            "between": config.cl_weight
            * batch.mean(torch.stack([apart(view, item_target) for view in content]).sum(0)),
            "within": config.cl_weight * batch.mean(torch.stack([*map(apart, content, content_targets)]).sum(0)),
            "reg": self.space.share(config.reg_weight * norms / self.space.count("item")),
        }

    def _dropped(self, batch: PairBatch, rows: torch.Tensor, number: int) -> torch.Tensor:
        """Target `number` (3): my rows, of which a fraction p of the entries is zero. Cosines need no scale."""
        side: Side = "item" if number else "user"
        return rows * (self.space.uniform(side, self.config.dim, batch.key("target", number)) >= self.config.dropout)


def apart(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """1 - cos of each pair of rows `[rows]`."""
    return 1 - cosine_similarity(one, other, dim=1)
