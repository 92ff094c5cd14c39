"""Plain single-process programs, written like the published code of such models: the baselines of the benchmarks.

They have one `torch.sparse` COO adjacency of stacked nodes, autograd through every step, negatives drawn row by row in
Python, `torch.optim.Adam` with its defaults, and batch x batch matrices. They leave out what published programs compute
but never use: AlignRec's similarity matrix of the negatives, and unused layers.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional

from distrec.data.dataset import Dataset, Interactions

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]


def adjacency(train: Interactions, users: int, items: int) -> torch.Tensor:
    """`D^-1/2 A D^-1/2` of stacked users and items, in COO format."""
    nodes = users + items
    user, item = (torch.from_numpy(ids.astype(np.int64)) for ids in (train.user, train.item))
    item = item + users
    row, column = torch.cat([user, item]), torch.cat([item, user])
    scale = torch.bincount(row, minlength=nodes).float().pow(-0.5)
    scale[scale.isinf()] = 0
    return coo(torch.stack([row, column]), scale[row] * scale[column], (nodes, nodes))


def coo(entries: torch.Tensor, values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return torch.sparse_coo_tensor(entries, values, size, check_invariants=True).coalesce()


class Program(ABC):
    """A model with its sampler and its training step."""

    def __init__(self, data: Dataset, weights: dict[str, np.ndarray], batch: int, lr: float):
        self.users, self.items, self.batch = data.users, data.items, batch
        train = data.interactions("train")
        self.pairs = np.stack([train.user, train.item], 1).astype(np.int64)
        self.candidates = np.unique(train.item).tolist()
        self.history: dict[int, set[int]] = {}
        for user, item in self.pairs.tolist():
            self.history.setdefault(user, set()).add(item)
        self.adjacency = adjacency(train, self.users, self.items)
        self.weights = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in weights.items()}
        self.optimizer = torch.optim.Adam(self.weights.values(), lr=lr)

    @abstractmethod
    def loss(self, users: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor: ...

    def epoch(self) -> Iterator[Batch]:
        """The epoch's batches, with negatives drawn one by one."""
        order = np.random.permutation(len(self.pairs))  # noqa: NPY002  as such programs do
        for start in range(0, len(order), self.batch):
            chosen = self.pairs[order[start : start + self.batch]]
            negatives = []
            for user in chosen[:, 0].tolist():
                item = random.choice(self.candidates)
                while item in self.history[user]:
                    item = random.choice(self.candidates)
                negatives.append(item)
            yield chosen[:, 0], chosen[:, 1], np.array(negatives)

    def step(self, users: np.ndarray, positives: np.ndarray, negatives: np.ndarray) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(torch.from_numpy(users), torch.from_numpy(positives), torch.from_numpy(negatives))
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def propagated(self, layers: int) -> tuple[torch.Tensor, torch.Tensor]:
        """LightGCN's mean over layers, for users and for items."""
        x = torch.cat([self.weights["user"], self.weights["item"]])
        outputs = [x]
        for _ in range(layers):
            x = torch.sparse.mm(self.adjacency, x)
            outputs.append(x)
        users, items = torch.split(torch.stack(outputs, 1).mean(1), [self.users, self.items])
        return users, items


class LightGcn(Program):
    layers, reg = 4, 1e-3

    def loss(self, users: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
        user_vectors, item_vectors = self.propagated(self.layers)
        u, p, n = user_vectors[users], item_vectors[positives], item_vectors[negatives]
        bpr = -functional.logsigmoid((u * p).sum(1) - (u * n).sum(1)).mean()
        ego = self.weights["user"][users], self.weights["item"][positives], self.weights["item"][negatives]
        return bpr + self.reg * sum(torch.norm(rows) for rows in ego) / len(users)


class AlignRec(Program):
    layers, k, reg, uia, cl, sim, temperature = 2, 10, 1e-4, 0.1, 0.01, 0.1, 0.2

    def __init__(self, data: Dataset, weights: dict[str, np.ndarray], batch: int, lr: float):
        super().__init__(data, weights, batch, lr)
        unit = functional.normalize(self.weights["content"].detach())
        cosines, neighbours = (unit @ unit.t()).topk(self.k)
        scale = cosines.sum(1).pow(-0.5)
        row = torch.arange(self.items).repeat_interleave(self.k)
        column = neighbours.flatten()
        values = scale[row] * cosines.flatten() * scale[column]
        self.item_item = coo(torch.stack([row, column]), values, (self.items, self.items))
        entries, values = self.adjacency.indices(), self.adjacency.values()
        upper = entries[0] < self.users
        shift = torch.tensor([[0], [self.users]])
        self.to_users = coo(entries[:, upper] - shift, values[upper], (self.users, self.items))

    def loss(self, users: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
        weights = self.weights
        user_id, item_id = self.propagated(self.layers)
        mixed = functional.linear(weights["content"], weights["mm_trs.weight"], weights["mm_trs.bias"])
        gate = torch.sigmoid(functional.linear(mixed, weights["gate_v.weight"], weights["gate_v.bias"]))
        item_mm = torch.sparse.mm(self.item_item, weights["item"] * gate)
        user_mm = torch.sparse.mm(self.to_users, item_mm)
        ids, content = torch.cat([user_id, item_id]), torch.cat([user_mm, item_mm])
        user_vectors, item_vectors = torch.split(ids + content, [self.users, self.items])
        u, p, n = user_vectors[users], item_vectors[positives], item_vectors[negatives]
        bpr = -functional.logsigmoid((u * p).sum(1) - (u * n).sum(1)).mean()
        squares = 0.5 * (u**2).sum() + 0.5 * (p**2).sum() + 0.5 * (n**2).sum()
        uia = 1 - functional.cosine_similarity(u, p, dim=-1).mean()
        cca = self.info_nce(item_mm[positives], item_id[positives]) + self.info_nce(user_mm[users], user_id[users])
        unit = functional.normalize(weights["content"].detach()[positives])
        z = item_mm[positives]
        similarity = torch.norm(torch.matmul(z, z.t()) - torch.matmul(unit, unit.t())) / len(users)
        return bpr + self.reg * squares / self.batch + self.uia * uia + self.cl * cca + self.sim * similarity

    def info_nce(self, anchors: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        anchors, candidates = functional.normalize(anchors, dim=1), functional.normalize(candidates, dim=1)
        own = torch.exp((anchors * candidates).sum(1) / self.temperature)
        everyone = torch.exp(torch.matmul(anchors, candidates.t()) / self.temperature).sum(1)
        return -torch.log(own / everyone).mean()


PROGRAMS: dict[str, type[Program]] = {"lightgcn": LightGcn, "alignrec": AlignRec}
