"""VBPR in one process and in float64. Section numbers in brackets refer to docs/methods/vbpr.md."""

from __future__ import annotations

import torch

from distrec.data.sampling import Triples
from distrec.methods.base import Method
from distrec.methods.batch import Step
from tests.methods.plain import Terms, Weights, features, ids


class Plain:
    def __init__(self, method: Method):
        self.config = method.config
        self.content = torch.cat([features(method.data, [name], self.config.fill) for name in self.config.features], 1)

    def scores(self, w: Weights) -> torch.Tensor:
        """x_ui without what is the same for all items of a user (2)."""
        dim = self.config.dim
        gamma_u, theta_u = w["user"][:, :dim], w["user"][:, dim:]
        visual = self.content @ w["factors.weight"].t()
        bias = w["item"][:, dim] + self.content @ w["bias.weight"].flatten()
        return gamma_u @ w["item"][:, :dim].t() + theta_u @ visual.t() + bias

    def terms(self, w: Weights, samples: Triples, at: Step) -> Terms:
        """The terms of (3)."""
        (u, p, n), scores = ids(samples), self.scores(w)
        squares = sum(x.square().sum() for x in (w["user"][u], w["item"][p], w["item"][n]))
        dense = w["factors.weight"].square().sum() + w["bias.weight"].square().sum()
        return {
            "bpr": -torch.log(torch.sigmoid(scores[u, p] - scores[u, n])).mean(),
            "reg": self.config.reg * squares / 2 / len(u) + self.config.content_reg * dense / 2,
        }
