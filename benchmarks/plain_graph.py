"""Plain single-process programs of STAIR and MENTOR, written like the published code of such models.

They have one adjacency of stacked users and items (STAIR's in CSR, like its authors'), autograd through every step,
optimizers with their defaults, negatives drawn row by row, and contrast over a dense users x users and an items x items
matrix. They start from the project's weights. Layers that the published programs never use are left out.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from plain import Program, coo
from torch.nn import functional

from distrec.data.dataset import Dataset, Interactions
from distrec.data.sampling import Triples
from distrec.methods.batch import Step, batch_of
from distrec.methods.mentor import Draws
from distrec.methods.workspace import Workspace
from distrec.parallel.partition import Partition
from distrec.parallel.world import World
from distrec.tables.spec import Side

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


def unit_features(data: Dataset, name: str) -> torch.Tensor:
    return functional.normalize(torch.from_numpy(data.feature_rows(name, 0, data.items)[0]))


class Smoothed(torch.optim.Optimizer):
    """STAIR's AdamW with a smoother (docs/methods/stair.md section 3.6), one tensor operation per line."""

    def __init__(self, parameter: torch.Tensor, lr: float, decay: float, matrix: torch.Tensor, powers: torch.Tensor):
        super().__init__([parameter], {"lr": lr, "weight_decay": decay, "betas": (0.9, 0.999), "eps": 1e-8})
        self.matrix, self.powers, self.layers = matrix, powers, 3

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (first, second), lr = group["betas"], group["lr"]
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["step"], state["m"], state["v"] = 0, torch.zeros_like(weight), torch.zeros_like(weight)
                state["step"] += 1
                weight.mul_(1 - lr * group["weight_decay"])
                state["m"].mul_(first).add_(weight.grad, alpha=1 - first)
                state["v"].mul_(second).addcmul_(weight.grad, weight.grad, value=1 - second)
                root = (state["v"].sqrt() / (1 - second ** state["step"]) ** 0.5).add_(group["eps"])
                direction = state["m"] / (1 - first ** state["step"]) / root
                weight.sub_(lr * convolved(self.matrix, direction, self.powers, self.layers))


def convolved(matrix: torch.Tensor, x: torch.Tensor, decay: torch.Tensor, layers: int) -> torch.Tensor:
    """STAIR's stepwise convolution (docs/methods/stair.md section 3.2): powers of the matrix, each column decayed."""
    total = x
    for _ in range(layers):
        x = torch.sparse.mm(matrix, x) * decay
        total = total + x
    return total * ((1 - decay.double()) / (1 - decay.double() ** (layers + 1))).float()


class Stair(Program):
    layers, gamma, decay = 3, 0.1, 0.3
    neighbours = (("text", 5), ("image", 1))

    def __init__(self, data: Dataset, weights: dict[str, np.ndarray], batch: int, lr: float):
        super().__init__(data, weights, batch, lr)
        self.candidates = list(range(self.items))
        self.adjacency = self.adjacency.to_sparse_csr()
        width = self.weights["item"].shape[1]
        backward = 0.1 + 0.9 * (torch.arange(width, dtype=torch.float64) / width) ** self.gamma
        self.forward_decay = (1 - backward).float()
        item_item = self.item_graph(data).to_sparse_csr()
        self.user_optimizer = torch.optim.AdamW([self.weights["user"]], lr=lr, weight_decay=self.decay)
        self.item_optimizer = Smoothed(self.weights["item"], lr, self.decay, item_item, backward.float())

    def item_graph(self, data: Dataset) -> torch.Tensor:
        """The item graph (docs/methods/stair.md section 3.3), from dense cosines."""
        entries = []
        for name, k in self.neighbours:
            unit = unit_features(data, name)
            cosines = (unit @ unit.t()).fill_diagonal_(-10)
            row = torch.arange(self.items).repeat_interleave(k)
            entries.append(torch.stack([row, cosines.topk(k).indices.flatten()]))
        joined = torch.cat(entries, 1)
        directed = coo(joined, torch.ones(joined.shape[1]), (self.items, self.items)).to_dense()
        weights = torch.maximum(directed, directed.t()).to_sparse_coo().coalesce()
        row, column = weights.indices()
        scale = torch.zeros(self.items).index_add_(0, row, weights.values()).pow(-0.5)
        return coo(weights.indices(), scale[row] * weights.values() * scale[column], (self.items, self.items))

    def loss(self, users: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
        stacked = torch.cat([self.weights["user"], self.weights["item"]])
        final = convolved(self.adjacency, stacked, self.forward_decay, self.layers)
        user_vectors, item_vectors = torch.split(final, [self.users, self.items])
        u, p, n = user_vectors[users], item_vectors[positives], item_vectors[negatives]
        return functional.softplus((u * n).sum(1) - (u * p).sum(1)).mean()

    def step(self, users: np.ndarray, positives: np.ndarray, negatives: np.ndarray) -> float:
        self.user_optimizer.zero_grad()
        self.item_optimizer.zero_grad()
        loss = self.loss(torch.from_numpy(users), torch.from_numpy(positives), torch.from_numpy(negatives))
        loss.backward()
        self.user_optimizer.step()
        self.item_optimizer.step()
        return loss.item()


class Mentor(Program):
    """With `everything`, compute all seven towers and both contrast matrices whatever their weight, as published."""

    hops, radius, k, image_weight = 2, 0.1, 10, 0.1
    reg, align, mask, dropout, temperature = 1e-3, 0.1, 1.5, 0.5, 0.2

    def __init__(
        self,
        data: Dataset,
        weights: dict[str, np.ndarray],
        batch: int,
        lr: float,
        contrast: float,
        everything: bool,
        repeated: int = 0,
        seed: int = 1,
    ):
        self.contrast, self.repeated, self.seed, self.steps = contrast, repeated, seed, 0
        self.noisy = bool(contrast) or everything
        towers = ["v", "t", "id", *(["v_n1", "t_n1", "v_n2", "t_n2"] if self.noisy else [])]
        super().__init__(data, self.by_tower(data, weights, towers), batch, lr)
        self.mask_weights = [torch.from_numpy(weights[f"mask.{kind}"]) for kind in ("weight", "bias")]
        names = {"v": "image", "t": "text"}
        self.inputs = {n: torch.from_numpy(data.feature_rows(name, 0, data.items)[0]) for n, name in names.items()}
        graphs = [self.neighbours(unit_features(data, name)) for name in names.values()]
        self.item_item = (self.image_weight * graphs[0] + (1 - self.image_weight) * graphs[1]).coalesce()

    def by_tower(self, data: Dataset, weights: dict[str, np.ndarray], towers: list[str]) -> dict[str, np.ndarray]:
        """Load the project's weights under this program's names; towers missing there start as their originals."""
        dim = weights["id"].shape[1]
        out = {"id_feat": weights["id"], "weight_u": weights["weight"]}
        for place, tower in enumerate(towers):
            like = tower if f"first.{tower}.bias" in weights else tower.partition("_")[0]
            place = place if like == tower else towers.index(like)
            out[f"{tower}.preference"] = weights["preference"][:, place * dim : (place + 1) * dim]
            for layer in ("first", "second"):
                for kind in ("weight", "bias"):
                    out[f"{tower}.{layer}.{kind}"] = weights[f"{layer}.{like}.{kind}"]
        return out

    def neighbours(self, unit: torch.Tensor) -> torch.Tensor:
        """The neighbour graph (docs/methods/mentor.md section 3.3): the k nearest with itself, at equal weights."""
        row = torch.arange(self.items).repeat_interleave(self.k)
        column = (unit @ unit.t()).topk(self.k).indices.flatten()
        values = torch.full((len(row),), 1 / (self.k + 1e-7))
        return coo(torch.stack([row, column]), values, (self.items, self.items))

    def step(self, users: np.ndarray, positives: np.ndarray, negatives: np.ndarray) -> float:
        # The first steps use the project's random draws, so that losses can be compared; later steps use torch's own.
        self.draws = self.project_draws() if self.steps < self.repeated else {}
        self.steps += 1
        return super().step(users, positives, negatives)

    def project_draws(self) -> dict[Any, torch.Tensor]:
        """The noise by (tower, hop) and the feature mask by side, as the project draws them at this step."""
        draws, width, out = Draws(), self.weights["id_feat"].shape[1], {}
        counts: Any = SimpleNamespace(users=self.users, items=self.items)
        space, nobody = Workspace(World(0, 1), counts, Interactions(*[np.empty(0, np.int64)] * 3)), Partition(1, 1)
        one = Triples(*[np.zeros(1, np.int64)] * 4)
        batch: Any = batch_of(space.world, nobody, nobody, one, Step(self.seed, 0, self.steps, 1, 1))
        sides: tuple[Side, Side] = ("user", "item")
        for side in sides:
            out[side] = draws.keep(space, batch, side, 2 * width, self.dropout)
        for hop in range(self.hops if self.contrast else 0):
            both = [draws.noise(space, batch, hop, side, 4 * width) for side in sides]
            for tower, columns in zip(("v_n1", "t_n1", "v_n2", "t_n2"), torch.cat(both).split(width, 1)):
                out[tower, hop] = columns
        return out

    def tower(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The user and item rows of one tower (docs/methods/mentor.md section 3.2)."""
        weights = {key.removeprefix(f"{name}."): x for key, x in self.weights.items() if key.startswith(f"{name}.")}
        rows = self.weights["id_feat"] if name == "id" else self.inputs[name.partition("_")[0]]
        hidden = functional.leaky_relu(functional.linear(rows, weights["first.weight"], weights["first.bias"]))
        encoded = functional.linear(hidden, weights["second.weight"], weights["second.bias"])
        x = functional.normalize(torch.cat([weights["preference"], encoded]))
        h, total = x, x
        for hop in range(self.hops):
            h = torch.sparse.mm(self.adjacency, h)
            if "_" in name:
                noise = self.draws[name, hop] if (name, hop) in self.draws else torch.rand_like(h)
                h = h + self.radius * torch.sign(h) * functional.normalize(noise)
            total = total + h
        users, items = torch.split(total, [self.users, self.items])
        return users, items

    def representation(
        self, first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor], weighed: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The user and item rows of a table (docs/methods/mentor.md section 3.4), two towers wide."""
        weight = self.weights["weight_u"]
        pair = (first[0] * weight[:, :1], second[0] * weight[:, 1:]) if weighed else (first[0], second[0])
        items = torch.cat([first[1], second[1]], 1)
        return torch.cat(pair, 1), items + torch.sparse.mm(self.item_item, items)

    def loss(self, users: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
        v, t, guide = self.tower("v"), self.tower("t"), self.tower("id")
        main = self.representation(v, t, True)
        tables = [main, *(self.representation(tower, tower, False) for tower in (guide, v, t))]
        u, p, n = main[0][users], main[1][positives], main[1][negatives]
        bpr = -torch.log2(torch.sigmoid((u * p).sum(1) - (u * n).sum(1))).mean()
        preferences = [self.weights[f"{name}.preference"][users] for name in ("v", "t")]
        reg = sum((rows**2).mean() for rows in (*preferences, self.weights["weight_u"]))
        total = bpr + self.reg * reg + self.align * self.alignment(tables) + self.mask * self.mask_term(*main)
        if self.noisy:
            one, two = (self.representation(self.tower(f"v_{n}"), self.tower(f"t_{n}"), True) for n in ("n1", "n2"))
            total = total + self.contrast * (self.info_nce(one[0], two[0]) + self.info_nce(one[1], two[1]))
        return total

    def alignment(self, tables: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """4.3."""
        both = [torch.cat(table) for table in tables]
        moments = [(x.var(), x.mean()) for x in both]
        pairs = [(a, b) for place, a in enumerate(moments) for b in moments[:place]]
        return torch.stack([(a[0] - b[0]).abs() + (a[1] - b[1]).abs() for a, b in pairs]).sum()

    @torch.no_grad()
    def mask_term(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """4.4."""
        total = torch.zeros(())
        for side, rows in (("user", users), ("item", items)):
            if self.draws:
                dropped = rows * self.draws[side] / (1 - self.dropout)
            else:
                dropped = functional.dropout(rows, self.dropout)
            total += 1 - functional.cosine_similarity(dropped, functional.linear(rows, *self.mask_weights)).mean()
        return total

    def info_nce(self, anchors: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """4.5."""
        anchors, candidates = functional.normalize(anchors), functional.normalize(candidates)
        own = torch.exp((anchors * candidates).sum(1) / self.temperature)
        everyone = torch.exp(torch.matmul(anchors, candidates.t()) / self.temperature).sum(1)
        return -torch.log(own / everyone).mean()
