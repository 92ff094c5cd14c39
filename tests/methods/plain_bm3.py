"""BM3 in one process and in float64. Section numbers in brackets refer to docs/methods/bm3.md."""

from __future__ import annotations

import torch

from distrec.data import keyed
from distrec.data.sampling import Pairs
from distrec.methods.base import Method
from distrec.methods.batch import Step
from tests.graph.cases import dense
from tests.methods.plain import Terms, Weights


def distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    lengths = one.norm(dim=1) * other.norm(dim=1)
    return 1 - ((one * other).sum(1) / lengths).mean()


class Plain:
    def __init__(self, method: Method):
        self.config, data = method.config, method.data
        train = data.interactions("train")
        pairs = sorted(set(zip(train.user.tolist(), train.item.tolist())))
        user, item = torch.tensor(pairs).t().numpy()
        adjacency = dense(user, item, data.users, data.items)
        powers = [torch.linalg.matrix_power(adjacency, hop) for hop in range(self.config.layers + 1)]
        self.mean, self.users, self.items = torch.stack(powers).mean(0), data.users, data.items

    def vectors(self, w: Weights) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.mean @ torch.cat([w["user"], w["item"]])
        return h[: self.users], h[self.users :] + w["item"]

    def target(self, rows: torch.Tensor, number: int, at: Step) -> torch.Tensor:
        key = ("target", at.seed, at.epoch, at.step, number, "item" if number else "user")
        draws = torch.from_numpy(keyed.uniform_rows(key, range(len(rows)), self.config.dim))
        return rows.detach() * (draws >= self.config.dropout) / (1 - self.config.dropout)

    def predicted(self, w: Weights, rows: torch.Tensor) -> torch.Tensor:
        return rows @ w["predictor.weight"].t() + w["predictor.bias"]

    def terms(self, w: Weights, samples: Pairs, at: Step) -> Terms:
        """The terms of (4)."""
        config, (hu, hi) = self.config, self.vectors(w)
        u, i = torch.from_numpy(samples.users), torch.from_numpy(samples.positives)
        user_target, item_target = self.target(hu, 0, at), self.target(hi, 1, at)
        between, within = [], []
        for place, name in enumerate(config.features):
            content = w[name] @ w[f"projections.{place}.weight"].t() + w[f"projections.{place}.bias"]
            online = self.predicted(w, content)[i]
            between.append(distance(online, item_target[i]))
            within.append(distance(online, self.target(content, 2 + place, at)[i]))
        return {
            "ui": distance(self.predicted(w, hu)[u], item_target[i])
            + distance(self.predicted(w, hi)[i], user_target[u]),
            "between": config.cl_weight * torch.stack(between).sum(),
            "within": config.cl_weight * torch.stack(within).sum(),
            "reg": config.reg_weight * (hu.norm() + hi.norm()) / self.items,
        }

    def scores(self, w: Weights) -> torch.Tensor:
        users, items = (self.predicted(w, rows) for rows in self.vectors(w))
        return users @ items.t()
