"""BPR-MF (Rendle et al. 2009): matrix factorisation with a pairwise loss. It reads IDs only and only looks up rows.

See docs/methods/bprmf.md.
"""

from __future__ import annotations

import torch
from pydantic import Field

from distrec.config.bounds import MOST_WIDTH
from distrec.data.histories import Histories
from distrec.methods.base import Method, MethodConfig, Representations
from distrec.methods.batch import TripleBatch
from distrec.methods.losses import bpr
from distrec.tables.spec import Table


class BprMf(Method):
    """Scores are inner products of user and item rows. It works with exact and sparse tables."""

    class Config(MethodConfig):
        dim: int = Field(64, ge=1, le=MOST_WIDTH, description="k, width of the user and item vectors")
        reg: float = Field(
            1e-4,
            ge=0,
            description="lambda, weight of half the squared L2 norms of the rows looked up, averaged over the batch",
        )

    config: BprMf.Config
    changeable = ("reg",)
    whole_tables = False
    sum_over_rows = True

    def tables(self) -> list[Table]:
        return [Table("user", "user", self.config.dim), Table("item", "item", self.config.dim)]

    def representations(self, histories: Histories) -> Representations:
        return Representations(self.block("user"), self.block("item"))

    def loss(self, batch: TripleBatch) -> dict[str, torch.Tensor]:
        (users,) = self.rows("user", batch.users)
        positives, negatives = self.rows("item", batch.positives, batch.negatives)
        squares = users.square().sum(1) + positives.square().sum(1) + negatives.square().sum(1)
        return {
            "bpr": batch.mean(bpr(users, positives, negatives)),
            "reg": self.config.reg * batch.mean(squares) / 2,
        }
