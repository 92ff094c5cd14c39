"""STAIR (Xu et al., AAAI 2025). Section numbers in brackets refer to docs/methods/stair.md.

Content gives the tables their initial values (3.4), and a graph of similar items smooths every update of the item table
(3.6). Scores come from a propagation over users and items whose reach differs by column (3.2): early columns are mostly
collaborative, late ones stay near their own values. There is no dense module, and BPR is the only loss term.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from distrec.config.bounds import MOST_LAYERS, MOST_NEIGHBOURS, MOST_WIDTH
from distrec.data.dataset import Dataset
from distrec.data.histories import Histories
from distrec.errors import InputError
from distrec.graph.polynomial import decaying_powers, polynomial
from distrec.methods.base import Graph, Method, MethodConfig, Representations, require_features
from distrec.methods.batch import TripleBatch
from distrec.methods.losses import bpr
from distrec.methods.workspace import Workspace
from distrec.tables.features import Fill
from distrec.tables.spec import Table


def stepwise_decay(dim: int, gamma: float) -> torch.Tensor:
    """b_j = 0.1 + 0.9 (j / d)^gamma (3.1), float64 `[dim]`.

    b is the decay of the backward convolution, and 1 - b that of the forward convolution.
    """
    return 0.1 + 0.9 * (torch.arange(dim, dtype=torch.float64) / dim) ** gamma


class STAIR(Method):
    """Scores are inner products of the outputs of the forward convolution (3.5)."""

    class Config(MethodConfig):
        features: list[str] = Field(["text", "image"], description="feature sets, in the order of 'neighbours'")
        neighbours: list[Annotated[int, Field(ge=1, le=MOST_NEIGHBOURS)]] = Field(
            [5, 1],
            description="k_m of each feature set: its neighbours per item in the item graph, and its weight in the "
            "initial values (3.3, 3.4)",
        )
        fill: Fill = Field(
            "mean", description="vector of an item without a feature row: mean of the present rows, or zeros"
        )
        dim: int = Field(
            64, ge=1, le=MOST_WIDTH, description="d, width of the tables; at most the width of each feature set (3.4)"
        )
        layers: int = Field(
            3, ge=0, le=MOST_LAYERS, description="L, number of hops of the forward and the backward convolution (3.2)"
        )
        gamma: float = Field(
            0.2, ge=1e-3, description="exponent of the schedule over columns, b_j = 0.1 + 0.9 (j / d)^gamma (3.1)"
        )

    config: STAIR.Config
    negatives_from = "all"

    def __init__(self, config: STAIR.Config, data: Dataset):
        super().__init__(config, data)
        require_features(data, config.features, "stair")
        if len(config.neighbours) != len(config.features):
            raise InputError(
                f"key 'method.neighbours' has {len(config.neighbours)} numbers but 'method.features' names "
                f"{len(config.features)} sets; give one number for each."
            )
        for name, k in zip(config.features, config.neighbours, strict=True):
            if k >= data.items:
                raise InputError(
                    f"key 'method.neighbours' has {k} for feature '{name}', which must be less than the {data.items} "
                    "items; lower it."
                )
            width = min(data.feature(name).width, data.items - 1)  # centring removes one direction
            if width < config.dim:
                raise InputError(
                    f"key 'method.dim' is {config.dim} but feature '{name}' has {data.feature(name).width} columns and "
                    f"{data.items} rows, and whitening needs as many columns and one row more; lower 'method.dim'."
                )

    def features(self) -> list[str]:
        return self.config.features

    def build(self, space: Workspace) -> None:
        super().build(space)
        config = self.config
        user, item = space.distinct_pairs()
        self.user_item = space.user_item(user, item)
        blocks = [space.features(name, config.fill) for name in config.features]
        nearest = [
            space.feature_neighbours(block, name, config.fill, k, include_self=False)
            for name, block, k in zip(config.features, blocks, config.neighbours, strict=True)
        ]
        self.item_item = space.item_graph(nearest, "symmetric")
        backward = stepwise_decay(config.dim, config.gamma)
        self.forward_weights = decaying_powers(1 - backward, config.layers)
        self.backward_weights = decaying_powers(backward, config.layers)
        self.parts = [
            k / sum(config.neighbours) * space.whitened(block, config.dim, name)
            for name, block, k in zip(config.features, blocks, config.neighbours, strict=True)
        ]
        mixed = torch.stack(self.parts).sum(0)
        self.initial = Representations(self._means(mixed, user, item), mixed)

    def _means(self, items: torch.Tensor, user: np.ndarray, item: np.ndarray) -> torch.Tensor:
        """For each of my users, the mean vector of the training items `[my users, dim]`; zero without any."""
        value = (1 / np.bincount(user)[user]).astype(np.float32)
        return self.space.matrix("user", "item", user, item, value).times_values(items)

    def tables(self) -> list[Table]:
        return [
            Table("user", "user", self.config.dim, start=lambda: self.initial.users),
            Table(
                "item",
                "item",
                self.config.dim,
                start=lambda: self.initial.items,
                smooth=self.smooth,
            ),
        ]

    def smooth(self, direction: torch.Tensor) -> torch.Tensor:
        """The backward stepwise convolution (3.6) of an item table's update: my rows of both, without gradient."""
        (out,) = polynomial(lambda x: (self.item_item.times_values(x),), self.backward_weights, direction)
        return out

    def graphs(self) -> dict[str, Graph]:
        return {"user_item": self.user_item, "item_item": self.item_item}

    def representations(self, histories: Histories) -> Representations:
        return self.propagated()

    def propagated(self) -> Representations:
        """My rows of the final vectors, with gradient."""
        users, items = self.user_item.propagate(self.block("user"), self.block("item"), self.forward_weights)
        return Representations(users, items)

    def loss(self, batch: TripleBatch) -> dict[str, torch.Tensor]:
        final = self.propagated()
        (users,) = batch.users.rows(final.users)
        (positives,) = batch.positives.rows(final.items)
        (negatives,) = batch.negatives.rows(final.items)
        return {"bpr": batch.mean(bpr(users, positives, negatives))}
