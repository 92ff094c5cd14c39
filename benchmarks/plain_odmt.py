"""ODMT as a plain single-process program: it encodes every slot of a batch and all positions of IMT's last block.

The project's two savings can be switched on separately, to measure the gain from each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional

from distrec.config.run import RunConfig
from distrec.data.dataset import Dataset
from distrec.data.histories import Histories

SOURCES = ("id", "text", "image")
Windows = tuple[np.ndarray, np.ndarray, np.ndarray]


class Odmt:
    """A model with its batches and its training step; weights have the project's names.

    Args:
        distinct: encode each distinct item of the batch once, and copy its vectors to its slots.
        read_out: in IMT's last block, compute only the three positions that are read.
    """

    def __init__(
        self, data: Dataset, weights: dict[str, np.ndarray], config: RunConfig, distinct: bool, read_out: bool
    ):
        self.method, self.batch, self.clip = config.method, config.train.global_batch, config.optimizer.clip_norm
        self.distinct, self.read_out = distinct, read_out
        train = data.interactions("train")
        self.histories = Histories([train], data.users)
        windows = self.histories.newest(np.arange(data.users), self.method["length"] + 1)
        counts = np.bincount(windows[windows >= 0], minlength=data.items)
        self.log_p = torch.from_numpy(np.log(np.maximum(counts, 1) / counts.sum())).float()
        self.tokens = []
        for name in ("text-tokens", "image-tokens"):
            values, count, _ = data.token_rows(name, 0, data.items)
            real = np.arange(values.shape[1]) < count[:, None]
            self.tokens.append((torch.from_numpy(values), torch.from_numpy(real)))
        self.w = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in weights.items()}
        self.optimizer = torch.optim.AdamW(
            self.w.values(), lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay
        )

    def epoch(self) -> Iterator[Windows]:
        users = np.random.permutation(np.flatnonzero(self.histories.lengths >= 2))  # noqa: NPY002  as such programs do
        for start in range(0, len(users), self.batch):
            chosen = users[start : start + self.batch]
            yield chosen, self.histories.newest(chosen, self.method["length"] + 1), chosen

    def step(self, users: np.ndarray, windows: np.ndarray, rows: np.ndarray) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(torch.from_numpy(windows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.w.values(), self.clip)
        self.optimizer.step()
        return loss.item()

    def loss(self, windows: torch.Tensor) -> torch.Tensor:
        slots, known = windows.flatten().clamp(min=0), windows[:, :-1] >= 0
        if self.distinct:
            ids, place = slots.unique(return_inverse=True)
            vectors = [vector[place] for vector in self.items(ids)]
        else:
            vectors = self.items(slots)
        user, position = known.nonzero().T
        label = user * windows.shape[1] + position + 1
        own = (slots[None, :, None] == windows[:, None, :]).any(-1)
        hidden = (windows.flatten() < 0) | own[user]
        hidden[torch.arange(len(label)), label] = False
        scores = {}
        for name, e in zip(SOURCES, vectors):
            u = self.users(name, e.view(*windows.shape, -1)[:, :-1], known)[known]
            scores[name] = (u @ e.t() - self.log_p[slots]).masked_fill(hidden, -1e4)
        total = sum(functional.cross_entropy(score, label) for score in scores.values())
        alpha, t = self.method["alpha"], self.method["tau"]
        weight = math.exp(-5 * (1 - min(1, alpha) / alpha) ** 2)
        mean = sum(scores.values()) / len(scores)
        for student, teacher in (("text", scores["id"]), ("image", scores["id"]), ("id", mean)):
            soft = (teacher / t).softmax(1) * (scores[student] / t).log_softmax(1)
            total = total - weight * t**2 * soft.sum(1).mean()
        return total  # type: ignore[return-value]

    def items(self, ids: torch.Tensor) -> list[torch.Tensor]:
        (text, text_real), (image, image_real) = ((values[ids], real[ids]) for values, real in self.tokens)
        parts = (("text", text.float()), ("image", image.float()), ("id", self.w["item"][ids].unsqueeze(1)))
        x = torch.cat([self.linear(value, f"project.{name}") for name, value in parts], 1)
        mask = torch.zeros(len(ids), 1, x.shape[1], x.shape[1])
        mask[..., :-1].masked_fill_(~torch.cat([text_real, image_real], 1)[:, None, None], -1e4)
        mask[:, :, :-1, -1] = -1e4
        layers, read = self.method["merged_att_layers"], [x.shape[1] - 1, 0, text.shape[1]]
        for layer in range(layers):
            last = layer == layers - 1 and self.read_out
            x = self.block(x, mask, f"imt.blocks.{layer}", layers, read if last else None)
        x = x if self.read_out else x[:, read]
        hidden = [functional.leaky_relu(self.linear(x[:, n], f"nets.{name}.0")) for n, name in enumerate(SOURCES)]
        return [self.linear(h, f"nets.{name}.2") for name, h in zip(SOURCES, hidden)]

    def users(self, name: str, inputs: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        x = self.norm(inputs + self.w[f"users.{name}.positions"], f"users.{name}.norm")
        past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        mask = torch.zeros(()).where(past & real[:, None, None], -1e9)
        for layer in range(self.method["user_layers"]):
            x = self.block(x, mask, f"users.{name}.blocks.{layer}", self.method["user_heads"])
        return x

    def block(
        self, x: torch.Tensor, mask: torch.Tensor, name: str, heads: int, read: list[int] | None = None
    ) -> torch.Tensor:
        asked, mask = (x, mask) if read is None else (x[:, read], mask[:, :, read])
        parts = ((asked, "query"), (x, "key"), (x, "value"))
        query, key, value = (
            self.linear(rows, f"{name}.attention.{part}").unflatten(-1, (heads, -1)).transpose(1, 2)
            for rows, part in parts
        )
        weights = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + mask).softmax(-1)
        mixed = self.linear((weights @ value).transpose(1, 2).flatten(2), f"{name}.attention.out")
        h = self.norm(asked + mixed, f"{name}.attention_norm")
        fed = self.linear(functional.relu(self.linear(h, f"{name}.inner")), f"{name}.outer")
        return self.norm(h + fed, f"{name}.feed_norm")

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-6)
