"""LightGCN (He et al. 2020): ID vectors propagated over the user-item graph, averaged over layers, trained with BPR.

See docs/methods/lightgcn.md.
"""

from __future__ import annotations

import torch
from pydantic import Field

from distrec.config.bounds import MOST_LAYERS, MOST_WIDTH
from distrec.data.histories import Histories
from distrec.graph.polynomial import mean_of_powers
from distrec.methods.base import Graph, Method, MethodConfig, Representations
from distrec.methods.batch import TripleBatch
from distrec.methods.losses import bpr
from distrec.methods.workspace import Workspace
from distrec.tables.spec import Table


class LightGCN(Method):
    """Scores are inner products of the propagated tables' means over layers 0 to K."""

    class Config(MethodConfig):
        dim: int = Field(64, ge=1, le=MOST_WIDTH, description="width of the user and item vectors")
        layers: int = Field(
            4,
            ge=0,
            le=MOST_LAYERS,
            description="K, number of propagation layers; the final vector is the mean over layers 0 to K",
        )
        reg: float = Field(
            1e-3,
            ge=0,
            description="weight of the Frobenius norms of the batch's layer-0 rows, divided by the batch size",
        )

    config: LightGCN.Config
    changeable = ("reg",)

    def tables(self) -> list[Table]:
        return [Table("user", "user", self.config.dim), Table("item", "item", self.config.dim)]

    def build(self, space: Workspace) -> None:
        super().build(space)
        self.graph = space.user_item()
        self.layer_weights = mean_of_powers(self.config.layers)

    def graphs(self) -> dict[str, Graph]:
        return {"user_item": self.graph}

    def representations(self, histories: Histories) -> Representations:
        return self.propagated()

    def propagated(self) -> Representations:
        """My rows of the final vectors, with gradient."""
        users, items = self.graph.propagate(self.block("user"), self.block("item"), self.layer_weights)
        return Representations(users, items)

    def loss(self, batch: TripleBatch) -> dict[str, torch.Tensor]:
        final = self.propagated()
        users, ego_users = batch.users.rows(final.users, self.block("user"))
        positives, ego_positives = batch.positives.rows(final.items, self.block("item"))
        negatives, ego_negatives = batch.negatives.rows(final.items, self.block("item"))
        squares = torch.stack([rows.square().sum() for rows in (ego_users, ego_positives, ego_negatives)])
        # Norms over the whole batch's rows, since those of workers' shares do not add up.
        norms = self.space.total(squares).sqrt().sum()
        return {
            "bpr": batch.mean(bpr(users, positives, negatives)),
            "reg": self.space.share(self.config.reg * norms / batch.size),
        }
