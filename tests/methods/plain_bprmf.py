"""BPR-MF in one process and in float64, as docs/methods/bprmf.md defines it."""

from __future__ import annotations

import torch

from distrec.data.sampling import Triples
from distrec.methods.base import Method
from distrec.methods.batch import Step
from tests.methods.plain import Terms, Weights, bpr, ids


class Plain:
    def __init__(self, method: Method):
        self.reg = method.config.reg

    def terms(self, w: Weights, samples: Triples, at: Step) -> Terms:
        u, p, n = ids(samples)
        rows = w["user"][u], w["item"][p], w["item"][n]
        norms = torch.stack([x.square().sum(1).mean() for x in rows])
        return {"bpr": bpr(*rows), "reg": self.reg * norms.sum() / 2}

    def scores(self, w: Weights) -> torch.Tensor:
        return w["user"] @ w["item"].t()
