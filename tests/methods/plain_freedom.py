"""FREEDOM in one process and in float64. Section numbers in brackets refer to docs/methods/freedom.md."""

from __future__ import annotations

import numpy as np
import torch

from distrec.data.sampling import Triples
from distrec.methods.base import Method
from distrec.methods.batch import Step
from tests.graph.cases import dense
from tests.methods.plain import Terms, Weights, bpr, features, ids


def degrees(numbers: np.ndarray) -> np.ndarray:
    return np.array([(numbers == number).sum() for number in numbers], np.float64)


class Plain:
    def __init__(self, method: Method):
        self.method, self.config, self.data = method, method.config, method.data
        train = self.data.interactions("train")
        pairs = sorted(set(zip(train.user.tolist(), train.item.tolist())))
        self.user, self.item = np.array(pairs).T
        self.similar = self.item_graph()

    def item_graph(self) -> torch.Tensor:
        """S (1), with the normalisation of the settings."""
        config, items = self.config, self.data.items
        graphs, counts = [], torch.zeros(items, items, dtype=torch.float64)
        for name in config.features:
            x = features(self.data, [name], config.fill)
            cosines = x @ x.t()
            order = (-cosines.float()).argsort(dim=1, stable=True)[:, : config.knn_k]
            near = torch.zeros(items, items, dtype=torch.float64).scatter_(1, order, 1.0)
            counts += near
            if config.normalisation == "uniform":
                graphs.append(near / (order.shape[1] + 1e-7))
            else:
                cosines = cosines * near
                root = cosines.sum(1).rsqrt()
                graphs.append(root[:, None] * cosines * root)
        if config.normalisation == "symmetric":
            w = torch.maximum(counts, counts.t())
            root = w.sum(1).rsqrt()
            return root[:, None] * w * root
        return sum(weight * graph for weight, graph in zip(config.weights, graphs, strict=True))

    def kept(self, at: Step) -> tuple[np.ndarray, np.ndarray]:
        """The edges of an epoch (2); the draw is the method's own."""
        if not self.config.pruned:
            return self.user, self.item
        weights = 1 / np.sqrt(degrees(self.user) * degrees(self.item))
        count = int(len(self.user) * (1 - self.config.pruned))
        kept = self.method.space.sample(weights, count, ("edges", at.seed, at.epoch))
        return self.user[kept], self.item[kept]

    def vectors(self, w: Weights, user: np.ndarray, item: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        adjacency, layer = dense(user, item, self.data.users, self.data.items), torch.cat([w["user"], w["item"]])
        layers = [layer]
        for _ in range(self.config.user_item_layers):
            layers.append(adjacency @ layers[-1])
        h = torch.stack(layers).mean(0)
        similar = w["item"]
        for _ in range(self.config.item_layers):
            similar = self.similar @ similar
        return h[: self.data.users], h[self.data.users :] + similar

    def terms(self, w: Weights, samples: Triples, at: Step) -> Terms:
        """The terms of (4)."""
        (u, p, n), (users, items) = ids(samples), self.vectors(w, *self.kept(at))
        contents = [w[name] @ w[f"each.{place}.weight"].t() for place, name in enumerate(self.config.features)]
        content = sum(bpr(users[u], x[p], x[n]) for x in contents)
        return {"bpr": bpr(users[u], items[p], items[n]), "content": self.config.content_weight * content}

    def scores(self, w: Weights) -> torch.Tensor:
        users, items = self.vectors(w, self.user, self.item)
        return users @ items.t()
