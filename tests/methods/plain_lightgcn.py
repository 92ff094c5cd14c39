"""LightGCN in one process and in float64, as docs/methods/lightgcn.md defines it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from distrec.data.sampling import Triples
from distrec.methods.base import Method
from distrec.methods.batch import Step
from tests.graph.cases import dense
from tests.methods.plain import Terms, Weights, bpr, ids


class Plain:
    cases: ClassVar[dict[str, dict[str, Any]]] = {
        "no layers": {"layers": 0, "dim": 3},
        "three layers": {"layers": 3, "reg": 0.1},
    }

    def __init__(self, method: Method):
        self.config, data = method.config, method.data
        train = data.interactions("train")
        adjacency = dense(train.user, train.item, data.users, data.items)
        hops = range(self.config.layers + 1)
        self.mean = torch.stack([torch.linalg.matrix_power(adjacency, hop) for hop in hops]).mean(0)
        self.users = data.users

    def final(self, w: Weights) -> torch.Tensor:
        return self.mean @ torch.cat([w["user"], w["item"]])

    def terms(self, w: Weights, samples: Triples, at: Step) -> Terms:
        (u, p, n), h = ids(samples), self.final(w)
        norms = torch.stack([torch.linalg.norm(x) for x in (w["user"][u], w["item"][p], w["item"][n])])
        loss = bpr(h[u], h[self.users + p], h[self.users + n])
        return {"bpr": loss, "reg": self.config.reg * norms.sum() / len(u)}

    def scores(self, w: Weights) -> torch.Tensor:
        h = self.final(w)
        return h[: self.users] @ h[self.users :].t()
