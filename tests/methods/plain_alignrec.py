"""AlignRec in one process and in float64. Section numbers in brackets refer to docs/methods/alignrec.md."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from distrec.data.sampling import Triples
from distrec.methods.base import Method
from distrec.methods.batch import Step
from tests.graph.cases import dense, normalised
from tests.methods.plain import Terms, Weights, bpr, features, ids, info_nce, item_graph


class AlignRec:
    """The views (3.3, 3.4) and the terms (4.1 to 4.5), as the page defines them."""

    def __init__(self, user: np.ndarray, item: np.ndarray, users: int, features: torch.Tensor, config: dict[str, Any]):
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
        vectors, content = self.views(w)
        h = vectors + content
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
            "cca_item": info_nce(z, vectors[self.users + p], t),
            "cca_user": info_nce(content[u], vectors[u], t),
            "sim": torch.linalg.norm(z @ z.t() - target @ target.t()) / len(u),
        }

    def total(self, terms: Terms) -> torch.Tensor:
        config = self.config
        weights = {"uia": config["uia_weight"], "sim": config["sim_weight"]}
        weights |= {"cca_item": config["cl_loss"], "cca_user": config["cl_loss"]}
        return sum(
            (weights.get(name, 1.0) * term for name, term in terms.items()), torch.zeros((), dtype=torch.float64)
        )


class Plain:
    """The same from a method's settings and data."""

    cases: ClassVar[dict[str, dict[str, Any]]] = {
        "more layers": {
            "item_layers": 2, "user_item_layers": 3, "side_emb_div": 2.0, "fill": "zeros", "cca_temperature": 0.5,
        },
        "no layers": {"moving_target": False, "features": ["image"], "item_layers": 0, "user_item_layers": 0},
        "fewest terms": {
            "cl_loss": 0.0, "uia_weight": 0.0, "sim_weight": 0.0, "layer_norm": True, "knn_k": 1, "dim": 5,
        },
    }  # fmt: skip

    def __init__(self, method: Method):
        config, data = method.config, method.data
        train, rows = data.interactions("train"), features(data, config.features, config.fill)
        self.config, self.users = config, data.users
        self.model = AlignRec(train.user, train.item, data.users, rows, config.model_dump())

    def terms(self, w: Weights, samples: Triples, at: Step) -> Terms:
        config = self.config
        weights = {"uia": config.uia_weight, "sim": config.sim_weight}
        weights |= {"cca_item": config.cl_loss, "cca_user": config.cl_loss}
        terms = self.model.terms(w, *ids(samples), configured=at.full_size)
        return {name: weights.get(name, 1) * term for name, term in terms.items() if weights.get(name, 1)}

    def scores(self, w: Weights) -> torch.Tensor:
        h = torch.stack(self.model.views(w)).sum(0)
        return h[: self.users] @ h[self.users :].t()
