"""VBPR (He & McAuley, AAAI 2016): matrix factorisation whose items also have factors that are computed from content.

Section numbers in brackets refer to docs/methods/vbpr.md.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field

from distrec.config.bounds import MOST_WIDTH
from distrec.data.dataset import Dataset
from distrec.data.histories import Histories
from distrec.methods.base import Method, MethodConfig, Representations, require_features
from distrec.methods.batch import TripleBatch
from distrec.methods.losses import bpr
from distrec.methods.workspace import Workspace
from distrec.tables.features import Fill, unit_rows
from distrec.tables.spec import Table, xavier_uniform


class Content(torch.nn.Module):
    """f to (E f, beta' f), the content's factors and its bias (2)."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.factors, self.bias = torch.nn.Linear(width, dim, bias=False), torch.nn.Linear(width, 1, bias=False)

    def forward(self, content: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[items, width]` to `[items, dim + 1]`; and the sum of all squared weights."""
        squares = self.factors.weight.square().sum() + self.bias.weight.square().sum()
        return torch.cat([self.factors(content), self.bias(content)], 1), squares


class VBPR(Method):
    """Scores are inner products of users' (gamma, theta, 1) and items' (gamma, E f, beta + beta' f) (2)."""

    class Config(MethodConfig):
        features: list[str] = Field(
            ["image"], description="feature sets whose vectors of unit length, side by side, are the content f (1)"
        )
        fill: Fill = Field(
            "mean", description="vector of an item without a feature row: mean of the present rows, or zeros"
        )
        dim: int = Field(64, ge=1, le=MOST_WIDTH, description="K and D, width of either kind of factors (2)")
        reg: float = Field(
            1e-4, ge=0, description="lambda, weight of half the squared norms of the batch's factors and biases (3)"
        )
        content_reg: float = Field(
            0.0, ge=0, description="lambda_E, weight of half the squared norm of E and beta' (3)"
        )

    config: VBPR.Config
    changeable = ("reg", "content_reg")

    def __init__(self, config: VBPR.Config, data: Dataset):
        super().__init__(config, data)
        require_features(data, config.features, "vbpr")

    def features(self) -> list[str]:
        return self.config.features

    def tables(self) -> list[Table]:
        return [
            Table("user", "user", 2 * self.config.dim),
            Table("item", "item", self.config.dim + 1, factors_and_bias),
        ]

    def dense(self) -> torch.nn.Module:
        return Content(sum(self.data.feature(name).width for name in self.config.features), self.config.dim)

    def build(self, space: Workspace) -> None:
        super().build(space)
        self.content = torch.cat(
            [unit_rows(space.features(name, self.config.fill)) for name in self.config.features], 1
        )

    def representations(self, histories: Histories) -> Representations:
        users, (content, _) = self.block("user"), self.dense_module(self.content)
        return Representations(
            torch.cat([users, torch.ones(len(users), 1)], 1), self._items(self.block("item"), content)
        )

    def _items(self, rows: torch.Tensor, content: torch.Tensor) -> torch.Tensor:
        """(gamma, E f, beta + beta' f) from rows of the table and of the dense module's output."""
        return torch.cat([rows[:, :-1], content[:, :-1], rows[:, -1:] + content[:, -1:]], 1)

    def loss(self, batch: TripleBatch) -> dict[str, torch.Tensor]:
        (users,) = self.rows("user", batch.users)
        positives, negatives = self.rows("item", batch.positives, batch.negatives)
        # The owner of an item projects its content, so that only dim + 1 numbers of it are sent.
        ids, place = torch.cat([batch.positives.ids, batch.negatives.ids]).unique(return_inverse=True)
        owned = batch.owned(ids)
        projected, weights = self.dense_module(*owned.rows(self.content))
        content = owned.spread(projected)
        positive, negative = (content[batch.my_rows(part)] for part in place.chunk(2))
        squares = users.square().sum(1) + positives.square().sum(1) + negatives.square().sum(1)
        vectors = torch.cat([users, torch.ones(len(users), 1)], 1)
        return {
            "bpr": batch.mean(bpr(vectors, self._items(positives, positive), self._items(negatives, negative))),
            "reg": self.config.reg * batch.mean(squares) / 2 + self.space.share(self.config.content_reg * weights / 2),
        }


def factors_and_bias(key: tuple[str | int, ...], rows: int, dim: int, start: int, stop: int) -> np.ndarray:
    """Initial values: Xavier uniform factors, and biases of 0 in the last column."""
    factors = xavier_uniform(key, rows, dim - 1, start, stop)
    return np.concatenate([factors, np.zeros((stop - start, 1), np.float32)], 1)
