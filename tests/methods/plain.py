"""Dense, single-process transcriptions of the methods in float64 autograd, with which the sharded ones are compared.

Section numbers in brackets refer to docs/methods/alignrec.md.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from tests.graph.cases import dense, normalised

Weights = dict[str, torch.Tensor]
Terms = dict[str, torch.Tensor]


def info_nce(anchors: torch.Tensor, candidates: torch.Tensor, temperature: float) -> torch.Tensor:
    """NCE (4.4): the mean over k of `-a_k b_k / t + log sum_j exp(a_k b_j / t)`, with all rows normalised."""
    a, b = functional.normalize(anchors, dim=1), functional.normalize(candidates, dim=1)
    similarity = a @ b.t() / temperature
    return (similarity.logsumexp(1) - similarity.diagonal()).mean()


def bpr(users: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    difference = (users * positives).sum(1) - (users * negatives).sum(1)
    return -torch.log(torch.sigmoid(difference)).mean()


def item_graph(content: torch.Tensor, k: int) -> torch.Tensor:
    """S (3.2) `[items, items]`: the `k` largest cosines per row, itself included, scaled by row sums on both sides."""
    unit = content / content.norm(dim=1, keepdim=True)
    cosines = unit @ unit.t()
    kept = torch.zeros_like(cosines)
    for row, values in enumerate(cosines):
        # Rounded, because the cosines of equal vectors may differ in the last bit.
        best = sorted(range(len(values)), key=lambda column, values=values: (-round(float(values[column]), 9), column))[
            :k
        ]
        kept[row, best] = values[best]
    sums = kept.sum(1)
    scale = torch.where(sums > 0, sums.clamp(min=1e-9).rsqrt(), 0.0)  # 0 where the formula is undefined is our choice
    return scale[:, None] * kept * scale[None, :]


class AlignRec:
    """The views (3.3, 3.4) and the terms (4.1 to 4.5), as the page defines them."""

    def __init__(
        self, user: np.ndarray, item: np.ndarray, users: int, features: torch.Tensor, config: dict[str, float]
    ):
        self.users, self.items, self.config = users, len(features), config
        self.adjacency = dense(user, item, users, self.items)
        self.r_hat = normalised(user, item, users, self.items)
        self.s = item_graph(features.double(), int(config["knn_k"]))
        self.frozen = features.double()

    def views(self, w: Weights) -> tuple[torch.Tensor, torch.Tensor]:
        """H_id and H_mm `[users + items, dim]`."""
        layer = torch.cat([w["user"], w["item"]])
        layers = [layer]
        for _ in range(int(self.config["user_item_layers"])):
            layer = self.adjacency @ layer
            layers.append(layer)
        x = w["content"]
        if self.config["layer_norm"]:
            x = functional.layer_norm(x, x.shape[1:], w["norm.weight"], w["norm.bias"])
        m = x @ w["mm_trs.weight"].t() + w["mm_trs.bias"]
        gate = torch.sigmoid(m @ w["gate_v.weight"].t() + w["gate_v.bias"])
        z = w["item"] * gate
        for _ in range(int(self.config["item_layers"])):
            z = self.s @ z
        content = torch.cat([self.r_hat @ z, z])
        return torch.stack(layers).mean(0), content / (self.config["side_emb_div"] or 1)

    def terms(self, w: Weights, u: torch.Tensor, p: torch.Tensor, n: torch.Tensor, configured: int) -> Terms:
        """The terms without their weights, except that `reg` includes its weight."""
        ids, content = self.views(w)
        h = ids + content
        hu, hp, hn = h[u], h[self.users + p], h[self.users + n]
        target = functional.normalize(
            (w["content"] if self.config["moving_target"] else self.frozen).detach()[p], dim=1
        )
        z = content[self.users + p]
        t = self.config["cca_temperature"]
        return {
            "bpr": bpr(hu, hp, hn),
            "reg": self.config["reg_weight"] * 0.5 * sum(x.square().sum() for x in (hu, hp, hn)) / configured,
            "uia": 1 - functional.cosine_similarity(hu, hp).mean(),
            "cca_item": info_nce(z, ids[self.users + p], t),
            "cca_user": info_nce(content[u], ids[u], t),
            "sim": torch.linalg.norm(z @ z.t() - target @ target.t()) / len(u),
        }

    def total(self, terms: Terms) -> torch.Tensor:
        config = self.config
        weights = {"uia": config["uia_weight"], "sim": config["sim_weight"]}
        weights |= {"cca_item": config["cl_loss"], "cca_user": config["cl_loss"]}
        return sum(
            (weights.get(name, 1.0) * term for name, term in terms.items()), torch.zeros((), dtype=torch.float64)
        )


def lightgcn(
    adjacency: torch.Tensor, w: Weights, u: torch.Tensor, p: torch.Tensor, n: torch.Tensor, layers: int, reg: float
) -> Terms:
    users, stacked = len(w["user"]), torch.cat([w["user"], w["item"]])
    h = sum(torch.linalg.matrix_power(adjacency, hop) @ stacked for hop in range(layers + 1)) / (layers + 1)
    norms = sum(torch.linalg.norm(x) for x in (w["user"][u], w["item"][p], w["item"][n]))
    return {"bpr": bpr(h[u], h[users + p], h[users + n]), "reg": reg * norms / len(u)}


def bprmf(w: Weights, u: torch.Tensor, p: torch.Tensor, n: torch.Tensor, reg: float) -> Terms:
    rows = w["user"][u], w["item"][p], w["item"][n]
    return {"bpr": bpr(*rows), "reg": reg * sum(x.square().sum(1).mean() for x in rows) / 2}
