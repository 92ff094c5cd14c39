"""ODMT in one process and in float64, without deduplication, as docs/methods/odmt.md defines it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional

from distrec.data.dataset import Dataset
from distrec.data.sampling import Windows
from distrec.methods.base import Method
from distrec.methods.batch import Step
from tests.methods.plain import Terms, Weights

SOURCES = ("id", "text", "image")


@dataclass(frozen=True)
class ODMT:
    """The fixed inputs.

    Attributes:
        text, image: tokens `[items, tokens, width]`.
        text_mask, image_mask: bool `[items, tokens]`.
        popularity: p `[items]`.
        config: the method's settings.
    """

    text: torch.Tensor
    image: torch.Tensor
    text_mask: torch.Tensor
    image_mask: torch.Tensor
    popularity: torch.Tensor
    config: dict[str, Any]

    def items(self, w: Weights, ids: torch.Tensor) -> list[torch.Tensor]:
        """3.2 to 3.4: the vectors `[n, dim]` of each source for items `[n]`; arbitrary for padding, which is -1."""
        c, rows = self.config, w["item"][ids.clamp(min=0)]
        text, image = self.text[ids], self.image[ids]
        if c["tie_cls_feature"]:
            (image if c["init"] == 2 else text)[:, 0] = rows.detach()
        tokens = [_linear(text, w, "project.text"), _linear(image, w, "project.image")]
        x = torch.cat([*tokens, _linear(rows, w, "project.id").unsqueeze(1)], 1)
        length = x.shape[1]
        mask = x.new_zeros(len(ids), length, length)
        mask[:, :, :-1].masked_fill_(~torch.cat([self.text_mask[ids], self.image_mask[ids]], 1)[:, None], -1e4)
        if c["version"] == "v1":
            mask[:, :-1, -1] = -1e4
        for layer in range(c["merged_att_layers"]):
            x = _block(x, mask, w, f"imt.blocks.{layer}", c["merged_att_layers"])
        out = []
        for name, place in zip(SOURCES, (-1, 0, text.shape[1]), strict=True):
            hidden = functional.leaky_relu(_linear(x[:, place], w, f"nets.{name}.0"), 0.01)
            out.append(_linear(hidden, w, f"nets.{name}.2"))
        return out

    def users(self, w: Weights, name: str, inputs: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """3.5: outputs `[users, length, dim]` for inputs of the same shape."""
        c, start = self.config, f"users.{name}"
        x = inputs + w[f"{start}.positions"]
        x = functional.layer_norm(x, x.shape[-1:], w[f"{start}.norm.weight"], w[f"{start}.norm.bias"], 1e-6)
        past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        mask = torch.where(past & real[:, None], 0.0, -1e9).double()
        for layer in range(c["user_layers"]):
            x = _block(x, mask, w, f"{start}.blocks.{layer}", c["user_heads"])
        return x

    def terms(self, w: Weights, windows: torch.Tensor, epoch: int) -> Terms:
        """4: the terms for windows `[users, length + 1]`, with -1 for padding, and for an epoch, counted from 1."""
        c, n = self.config, windows.numel()
        slots = windows.flatten()
        vectors, known = self.items(w, slots), windows[:, :-1] >= 0
        own = (slots[None, :, None] == windows[:, None, :]).any(-1)  # [users, slots]; a padded place counts as own too
        user, position = known.nonzero().T
        label = user * windows.shape[1] + position + 1
        log_p = self.popularity[slots.clamp(min=0)].log()
        hidden = (slots < 0) | own[user]
        hidden[torch.arange(len(label)), label] = False
        scores, terms = {}, {}
        for name, e in zip(SOURCES, vectors, strict=True):
            u = self.users(w, name, e.view(*windows.shape, -1)[:, :-1], known)[known]
            scores[name] = (u @ e.view(n, -1).t() - log_p).masked_fill(hidden, -1e4)
            terms[f"ce_{name}"] = functional.cross_entropy(scores[name], label)
        alpha, t = c["alpha"], c["tau"]
        weight = math.exp(-5 * (1 - min(epoch, alpha) / alpha) ** 2) if alpha >= 1 else alpha
        mean = sum(scores.values()) / 3
        pairs = (("text", scores["id"]), ("image", scores["id"]), ("id", mean))
        soft = [-((a / t).softmax(1) * (scores[b] / t).log_softmax(1)).sum(1).mean() * t**2 for b, a in pairs]
        return terms | ({"kd": weight * sum(soft)} if weight else {})  # type: ignore[dict-item]


def _linear(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    return functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def _block(x: torch.Tensor, mask: torch.Tensor, w: Weights, name: str, heads: int) -> torch.Tensor:
    """3.3: `H = LN(X + MHA(X))`, `Y = LN(H + W2 relu(W1 H + b1) + b2)`."""
    head = x.shape[-1] // heads
    query, key, value = (_linear(x, w, f"{name}.attention.{part}") for part in ("query", "key", "value"))
    mixed = []
    for number in range(heads):
        part = slice(number * head, (number + 1) * head)
        logits = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(head) + mask
        mixed.append(logits.softmax(-1) @ value[..., part])
    attended = x + _linear(torch.cat(mixed, -1), w, f"{name}.attention.out")
    h = _norm(attended, w, f"{name}.attention_norm")
    return _norm(
        h + _linear(functional.relu(_linear(h, w, f"{name}.inner")), w, f"{name}.outer"), w, f"{name}.feed_norm"
    )


def _norm(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def plain_of(data: Dataset, config: dict[str, Any]) -> ODMT:
    """The transcription, with inputs that are read and counted without the method's code."""
    tokens = {}
    for name in ("text", "image"):
        values, count, _ = data.token_rows(f"{name}-tokens", 0, data.items)
        mask = [[place < max(1, length) for place in range(values.shape[1])] for length in count.tolist()]
        tokens |= {name: torch.from_numpy(values).double(), f"{name}_mask": torch.tensor(mask)}
    histories: dict[int, list[int]] = {}
    train = data.interactions("train")
    for user, item in zip(train.user.tolist(), train.item.tolist(), strict=True):
        histories.setdefault(user, []).append(item)
    counts = torch.zeros(data.items, dtype=torch.float64)
    for history in histories.values():
        for item in history[-config["length"] - 1 :] if len(history) > 1 else []:
            counts[item] += 1
    return ODMT(**tokens, popularity=counts / counts.sum(), config=config)


class Plain:
    """The same from a method's settings and data."""

    cases: ClassVar[dict[str, dict[str, Any]]] = {
        "as published": {"init": 1, "id_dim": 6, "length": 5},
        "a column per slot": {"init": 1, "id_dim": 6, "dedupe": False},
        "nothing hidden": {"version": "v3"},
        "one block": {"merged_att_layers": 1, "user_layers": 1, "user_heads": 4, "tau": 2.0},
        "four blocks": {"merged_att_layers": 4, "version": "v3", "alpha": 0.3, "length": 2},
        "tied texts": {"init": 3, "id_dim": 6, "tie_cls_feature": True},
        "tied images, a column per slot": {"init": 2, "id_dim": 6, "tie_cls_feature": True, "dedupe": False},
        "not distilled": {"alpha": 0},
    }

    def __init__(self, method: Method):
        self.whole = plain_of(method.data, method.config.model_dump())

    def terms(self, w: Weights, samples: Windows, at: Step) -> Terms:
        return self.whole.terms(w, torch.from_numpy(samples.items), at.epoch + 1)
