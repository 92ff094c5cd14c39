"""FREEDOM (Zhou & Shen, MM 2023): a frozen item graph, and a user-item graph that is pruned anew in each epoch.

Section numbers in brackets refer to docs/methods/freedom.md.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field

from distrec.config.bounds import MOST_LAYERS, MOST_NEIGHBOURS, MOST_WIDTH
from distrec.data.dataset import Dataset
from distrec.data.histories import Histories
from distrec.errors import InputError
from distrec.graph.neighbours import Normalisation
from distrec.graph.polynomial import mean_of_powers
from distrec.graph.user_item import UserItemGraph
from distrec.methods.base import Graph, Method, MethodConfig, Representations, require_features
from distrec.methods.batch import TripleBatch
from distrec.methods.losses import bpr
from distrec.methods.workspace import Workspace
from distrec.tables.features import Fill
from distrec.tables.spec import Table


class Projections(torch.nn.Module):
    """A projection of each feature set into the space of the vectors (4)."""

    def __init__(self, widths: list[int], dim: int):
        super().__init__()
        self.each = torch.nn.ModuleList(torch.nn.Linear(width, dim, bias=False) for width in widths)

    def forward(self, *contents: torch.Tensor) -> list[torch.Tensor]:
        """`[items, width]` of each set to `[items, dim]`."""
        return [net(rows) for net, rows in zip(self.each, contents, strict=True)]


class FREEDOM(Method):
    """Trains on the pruned user-item graph and ranks on the whole one; scores are inner products (3)."""

    class Config(MethodConfig):
        features: list[str] = Field(["text", "image"], description="feature sets, whose vectors train (4)")
        weights: list[float] = Field(
            [0.9, 0.1], description="alpha, weight of each feature set's graph in the item graph, in the same order (1)"
        )
        fill: Fill = Field(
            "mean", description="vector of an item without a feature row: mean of the present rows, or zeros"
        )
        dim: int = Field(64, ge=1, le=MOST_WIDTH, description="d, width of all vectors (3)")
        user_item_layers: int = Field(
            2, ge=0, le=MOST_LAYERS, description="L_ui, number of hops on the user-item graph (3)"
        )
        item_layers: int = Field(1, ge=0, le=MOST_LAYERS, description="L_ii, number of hops on the item graph (3)")
        knn_k: int = Field(
            10, ge=1, le=MOST_NEIGHBOURS, description="k, neighbours of an item per feature set, itself included (1)"
        )
        normalisation: Normalisation = Field(
            "uniform", description="weights in a feature set's graph: uniform, as published, cosine or symmetric (1)"
        )
        pruned: float = Field(
            0.8, ge=0, lt=1, description="rho, fraction of the user-item graph's edges that an epoch leaves out (2)"
        )
        content_weight: float = Field(1e-3, ge=0, description="lambda, weight of the contents' BPR terms (4)")

    config: FREEDOM.Config
    changeable = ("content_weight",)

    def __init__(self, config: FREEDOM.Config, data: Dataset):
        super().__init__(config, data)
        require_features(data, config.features, "freedom")
        if len(config.weights) != len(config.features):
            raise InputError(
                f"key 'method.weights' has {len(config.weights)} numbers but 'method.features' names "
                f"{len(config.features)} sets; give one number for each."
            )

    def features(self) -> list[str]:
        return self.config.features

    def tables(self) -> list[Table]:
        dim = self.config.dim
        contents = [self.trained_features(name) for name in self.config.features]
        return [Table("user", "user", dim), Table("item", "item", dim), *contents]

    def dense(self) -> torch.nn.Module:
        return Projections([self.data.feature(name).width for name in self.config.features], self.config.dim)

    def build(self, space: Workspace) -> None:
        super().build(space)
        config = self.config
        self.user, self.item = space.distinct_pairs()
        self.whole = self.kept_edges = space.user_item(self.user, self.item)
        lists = [
            space.feature_neighbours(space.features(name, config.fill), name, config.fill, config.knn_k)
            for name in config.features
        ]
        weighted = config.normalisation != "symmetric"
        self.item_item = space.item_graph(lists, config.normalisation, config.weights if weighted else None)

    def start_epoch(self, seed: int, epoch: int) -> None:
        """Draw the edges that this epoch keeps: those between nodes of low degree more often (2)."""
        if not self.config.pruned:
            return
        degrees = np.bincount(self.user)[self.user], np.bincount(self.item)[self.item]
        count = int(len(self.user) * (1 - self.config.pruned))
        kept = self.space.sample((degrees[0] * degrees[1]) ** -0.5, count, ("edges", seed, epoch))
        self.kept_edges = self.space.user_item(self.user[kept], self.item[kept])

    def graphs(self) -> dict[str, Graph]:
        return {"user_item": self.whole, "item_item": self.item_item}

    def vectors(self, graph: UserItemGraph) -> Representations:
        """My rows of the vectors of users and items, with gradient (3)."""
        similar = self.block("item")
        for _ in range(self.config.item_layers):
            similar = self.item_item.times(similar)
        weights = mean_of_powers(self.config.user_item_layers)
        users, items = graph.propagate(self.block("user"), self.block("item"), weights)
        return Representations(users, items + similar)

    def representations(self, histories: Histories) -> Representations:
        return self.vectors(self.whole)

    def loss(self, batch: TripleBatch) -> dict[str, torch.Tensor]:
        found = self.vectors(self.kept_edges)
        contents = self.dense_module(*(self.block(name) for name in self.config.features))
        (users,) = batch.users.rows(found.users)
        positives, negatives = (lookup.rows(found.items, *contents) for lookup in (batch.positives, batch.negatives))
        terms = [batch.mean(bpr(users, *pair)) for pair in zip(positives, negatives, strict=True)]
        return {"bpr": terms[0], "content": self.config.content_weight * torch.stack(terms[1:]).sum()}
