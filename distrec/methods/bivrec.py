"""BiVRec (Hu et al. 2024), at two levels, which are different methods. Results name the level.

Section numbers in brackets refer to docs/methods/bivrec.md.

`prototype` is what the authors' public code computes. That code is eight months older than the paper and lacks four of
its parts: patches at several scales, Gaussian attention, the allocation term and recommendation by content. Each of the
code's mistakes has its own switch, which is on at this level:

    pad_collision        item 0 is also the padding id: look-ups never send it a gradient, and it is never recommended
    unmasked_content     places without an item carry item 0's features into the content view
    padded_sums          such places are included in the number of an interest's items
    noise_in_evaluation  Gumbel noise is drawn when ranking too (here by user, so that a ranking can be repeated)
    zero_tokens          the content view's interest tokens start at zero, so that at first noise alone (with `close`,
                         rounding) assigns items
    cluster_norm         `released`: a second softmax makes the assignment almost uniform
    nce                  `released`: the contrast pulls all pairs together, not only the two views of a history

`reconstruction` is our definition of the paper's method (4), because the paper's text was not available. Its results
are those of a reconstruction, not of BiVRec.

    L = lambda_id CE_id + lambda_mm CE_mm + lambda_c L_c + lambda_f L_f        full softmax over all items in both views

Frozen features never leave their worker: the owner of a row projects it, and only the result of width `dim` is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator

from distrec.config.bounds import MOST_INTERESTS, MOST_LENGTH, MOST_WIDTH
from distrec.data import keyed
from distrec.data.dataset import Dataset, Interactions
from distrec.data.histories import Histories
from distrec.data.sampling import RandomWindows, Sampler
from distrec.errors import InputError
from distrec.methods.base import Method, MethodConfig, Representations, require_features
from distrec.methods.batch import OwnedRows, WindowBatch
from distrec.methods.interests import (
    ClusterAttention,
    Content,
    GaussianAttention,
    Patches,
    TwoViews,
    View,
    allocation_distance,
)
from distrec.methods.sequential import user_vectors
from distrec.methods.workspace import Workspace
from distrec.tables.features import Fill, unit_rows
from distrec.tables.spec import Table, normal

VIEWS = ("id", "mm")
_FIRST = 4  # a training target has at least this many items before it (2)
_NEVER = -1e30  # below every other score, but finite

# Level `prototype`: its defaults where they differ from those below, and the values of settings that it does not have.
_RELEASED: dict[str, Any] = {
    "modality": "image",
    "dropout": 0.5,
    "cluster_norm": "released",
    "nce": "released",
    "pad_collision": True,
    "unmasked_content": True,
    "padded_sums": True,
    "noise_in_evaluation": True,
    "zero_tokens": True,
}
_ABSENT: dict[str, Any] = {
    "scales": [1],
    "positions": False,
    "gaussian": "none",
    "lambda_mm": 0.0,
    "lambda_f": 0.0,
    "allocation": "co_allocation",
    "tau_a": 1.0,
    "rank_by": "id",
}


class Draws:
    """Gumbel noise, keyed by what it is for: the same at any number of workers."""

    def training(self, batch: WindowBatch, view: str, interests: int, tokens: int) -> torch.Tensor:
        """For my rows of the batch, by their positions in the epoch `[my rows, interests, tokens]`."""
        return _gumbel(batch.uniform(interests * tokens, "gumbel", view), interests)

    def evaluation(self, users: np.ndarray, view: str, interests: int, tokens: int) -> torch.Tensor:
        """For consecutive users `[users, interests, tokens]`."""
        first = int(users[0]) if len(users) else 0
        rows = range(first, first + len(users))
        return _gumbel(
            torch.from_numpy(keyed.uniform_rows(("evaluation gumbel", view), rows, interests * tokens)), interests
        )


def _gumbel(uniform: torch.Tensor, interests: int) -> torch.Tensor:
    """Gumbel draws `[rows, interests, tokens]` from uniform ones `[rows, interests x tokens]`, in place."""
    draws = uniform.unflatten(1, (interests, -1))
    return draws.clamp_(min=torch.finfo(torch.float32).tiny).log_().neg_().log_().neg_()


class BiVRec(Method):
    """Scores are inner products of an item's vector with the user's best-matching interest."""

    class Config(MethodConfig):
        level: Literal["prototype", "reconstruction"] = Field(
            "reconstruction",
            description="prototype: what the authors' public code computes; reconstruction: our reading of the paper",
        )
        image: str = Field("image", description="feature set of images")
        text: str = Field("text", description="feature set of texts")
        fill: Fill = Field(
            "mean", description="vector of an item without a feature row: mean of the present rows, or zeros"
        )
        modality: Literal["image", "text", "both"] = Field(
            "both", description="features that the content view reads: image, text or both (3)"
        )
        mm_type: Literal["concat", "sum"] = Field(
            "concat", description="how image and text are joined: concat, by a linear map of both; sum, by addition (3)"
        )
        dim: int = Field(64, ge=1, le=MOST_WIDTH, description="d, width of item vectors and interests (3)")
        interests: int = Field(4, ge=1, le=MOST_INTERESTS, description="K, number of interests per view (3)")
        length: int = Field(
            20, ge=1, le=MOST_LENGTH, description="S, number of items read from the end of a history (2)"
        )
        gumbel: Literal["open", "close"] = Field(
            "open", description="noise in the assignment of items to interests: open, Gumbel noise; close, none (3)"
        )
        tau: float = Field(1.0, gt=0, description="temperature of the softmax that assigns items to interests (3)")
        shelter: int = Field(
            1, ge=1, le=MOST_INTERESTS, description="interests per item in the assignment, at most 'interests' (3)"
        )
        temperature: float = Field(0.07, ge=0.03, description="temperature of the contrast between the views (4)")
        dropout: float = Field(0.2, ge=0, lt=1, description="dropout rate of inputs, assignments and heads (3)")
        lambda_id: float = Field(1.0, ge=0, description="weight of recommendation by IDs; lambda1 in the prototype (4)")
        lambda_c: float = Field(
            1.0, ge=0, description="weight of the contrast of the views; lambda2 in the prototype (4)"
        )
        nce: Literal["released", "intended", "clip"] = Field(
            "clip",
            description="what the contrast pulls together: released, all pairs; intended, a history's views; clip, "
            "these both ways (4)",
        )
        cluster_norm: Literal["groupvit", "released"] = Field(
            "groupvit",
            description="normalisation of assignments: groupvit, by their sum; released, by a further softmax (4, B4)",
        )
        pad_collision: bool = Field(False, description="use item 0 as the padding too, as in the public code (2)")
        unmasked_content: bool = Field(
            False, description="give empty places item 0's features, as in the public code (3)"
        )
        padded_sums: bool = Field(
            False, description="count empty places among an interest's items, as in the public code (3)"
        )
        noise_in_evaluation: bool = Field(False, description="draw noise for ranking too, as in the public code (3)")
        zero_tokens: bool = Field(
            False, description="start the content view's tokens at zero, as in the public code (3)"
        )
        scales: list[Annotated[int, Field(ge=1, le=MOST_LENGTH)]] = Field(
            [1, 2, 4],
            min_length=1,
            description="P, sizes of the patches that a history is cut into, in ascending order (4, B2)",
        )
        positions: bool = Field(True, description="add learned vectors of position and scale to the patches (4, B2)")
        gaussian: Literal["feature", "position", "none"] = Field(
            "feature",
            description="kind of Gaussian attention: feature, by distance of features; position, by distance to a "
            "learned place; none (4, B3)",
        )
        lambda_mm: float = Field(1.0, ge=0, description="weight of recommendation by content; 0 leaves it out (4, B5)")
        lambda_f: float = Field(
            0.1, ge=0, description="weight of the distance between the views' allocations; 0 leaves it out (4, B7)"
        )
        allocation: Literal["co_allocation", "aligned"] = Field(
            "co_allocation",
            description="what 'lambda_f' weighs: co_allocation, distance over pairs of items; aligned, over equal "
            "interests (4, B7)",
        )
        tau_a: float = Field(1.0, gt=0, description="temperature of the allocation's softmax over interests (4, B7)")
        rank_by: Literal["id", "mm", "both"] = Field(
            "id", description="view that ranks: id, mm (content), or both, by the sum of their scores (4, B8)"
        )

        @model_validator(mode="before")
        @classmethod
        def _of_level(cls, tree: Any) -> Any:
            """Fill in the prototype's own defaults."""
            if not isinstance(tree, Mapping) or tree.get("level") != "prototype":
                return tree
            for key, value in _ABSENT.items():
                if tree.get(key, value) != value:
                    raise InputError(
                        f"key 'method.{key}' is {tree[key]!r} but level 'prototype' has no such part; remove the key "
                        "or set 'method.level' to 'reconstruction'."
                    )
            return _RELEASED | dict(tree) | _ABSENT

        @field_validator("scales")
        @classmethod
        def _ascending(cls, scales: list[int]) -> list[int]:
            if sorted(set(scales)) != scales:
                raise ValueError("must be sizes in ascending order")
            return scales

    config: BiVRec.Config
    reads_histories = True
    changeable = ("temperature", "dropout", "lambda_id", "lambda_c", "lambda_mm", "lambda_f")

    def __init__(self, config: BiVRec.Config, data: Dataset):
        super().__init__(config, data)
        require_features(data, self.features(), "bivrec")
        if config.shelter > config.interests:
            raise InputError(
                f"key 'method.shelter' is {config.shelter} but there are {config.interests} interests; lower it."
            )
        self.draws = Draws()
        self._ranked = list(VIEWS) if config.rank_by == "both" else [config.rank_by]

    def title(self) -> str:
        view = "" if self.config.level == "prototype" else f", ranked by {self.config.rank_by}"
        return f"bivrec ({self.config.level}{view})"

    def features(self) -> list[str]:
        names = {"image": self.config.image, "text": self.config.text}
        return list(names.values()) if self.config.modality == "both" else [names[self.config.modality]]

    def sampler(self, train: Interactions, seed: int) -> Sampler:
        return RandomWindows(Histories([train], self.data.users), self.config.length + 1, _FIRST, seed)

    def tables(self) -> list[Table]:
        return [Table("item", "item", self.config.dim, normal(0.02))]

    def dense(self) -> torch.nn.Module:
        config = self.config
        content = Content([self.data.feature(name).width for name in self.features()], config.dim, config.mm_type)
        return TwoViews(content, {name: self._view(name) for name in VIEWS}, config.dim, config.dropout)

    def _view(self, name: str) -> View:
        config = self.config
        patches = Patches(config.dim, config.length, config.scales, config.positions)
        gaussian = None
        if config.gaussian != "none":
            gaussian = GaussianAttention(config.dim, config.interests, config.gaussian, patches.centres())
        cluster = ClusterAttention(
            config.dim, config.gumbel, config.tau, config.shelter, config.cluster_norm, config.padded_sums,
            config.dropout,
        )  # fmt: skip
        masked = name == "id" or not config.unmasked_content
        zero = name == "mm" and config.zero_tokens
        return View(config.dim, config.interests, patches, gaussian, cluster, masked, zero, config.dropout)

    def build(self, space: Workspace) -> None:
        super().build(space)
        self.inputs = [space.features(name, self.config.fill) for name in self.features()]

    def loss(self, batch: WindowBatch) -> dict[str, torch.Tensor]:
        config, targets = self.config, batch.last_items()
        seen: dict[str, torch.Tensor] = self.dense_module(lambda net: self._read(net, batch))
        catalogues = {"id": (config.lambda_id, self.block("item")), "mm": (config.lambda_mm, seen["content"])}
        terms = {
            f"ce_{view}": weight / batch.size * self.space.cross_entropy(seen[f"interest_{view}"], rows, targets)
            for view, (weight, rows) in catalogues.items()
            if view == "id" or weight
        }
        terms["contrast"] = config.lambda_c * self._contrast(batch, seen["z_id"], seen["z_mm"])
        if config.lambda_f:
            terms["allocation"] = config.lambda_f * batch.mean(seen["allocation"])
        return terms

    def _read(self, net: TwoViews, batch: WindowBatch) -> dict[str, torch.Tensor]:
        """The dense module's outputs that the loss needs, for my share of the batch and for my items.

        Returns:
            `content` `[my items, dim]`; for each row of my share and either view, `interests_*` `[my rows, K, dim]`,
            the one of these that the target selects as `interest_*`, and `z_*`, `[my rows, dim]` each; and
            `allocation` `[my rows]` if it is used.
        """
        config, lookup, real = self.config, batch.lookup(), batch.real[:, :-1]
        content = self._content(net, None if config.lambda_mm else batch.owned(torch.unique(lookup.ids)))
        ids, contents = lookup.rows(self.block("item"), content)
        if config.pad_collision:
            ids = torch.where((lookup.mine == 0).unsqueeze(-1), ids.detach(), ids)
        seen, logits, there = {"content": content}, {}, real
        for view, rows in (("id", ids), ("mm", contents)):
            noise = self.draws.training(batch, view, config.interests, net.tokens) if config.gumbel == "open" else None
            interests, logits[view], there = net.interests(view, rows[:, :-1], real, noise)
            seen |= {f"interests_{view}": interests, f"interest_{view}": net.readout(interests, rows[:, -1].detach())}
            seen[f"z_{view}"] = net.pooled(view, interests)
        if config.lambda_f:
            first, second = ((logits[view] / config.tau_a).log_softmax(1) for view in VIEWS)
            seen["allocation"] = allocation_distance(first, second, there, config.allocation)
        return seen

    def _content(self, net: TwoViews, some: OwnedRows | None) -> torch.Tensor:
        """Content vectors of my items `[my items, dim]`; with a list of distinct items, zeros for all others."""
        if some is None:
            content: torch.Tensor = net.content(*self.inputs)
            return content
        return some.placed(net.content(*some.rows(*self.inputs)))

    def _contrast(self, batch: WindowBatch, ids: torch.Tensor, contents: torch.Tensor) -> torch.Tensor:
        """My share of the contrast of both views over the global batch (4); S is cosine / temperature.

        `released`: mean_i log sum_{j != i} exp S_ij - mean_ij S_ij.
        `intended`: mean_i [ -S_ii + log sum_{j != i} exp S_ij ].
        `clip`: cross-entropy with the diagonal as target, half over rows and half over columns.

        It is computed in float64: at the start all vectors are nearly equal, and gradients are their small differences
        divided by small norms.
        """
        temperature = self.config.temperature
        ids, contents = unit_rows(ids.double()), unit_rows(contents.double())
        all_contents = batch.everyone(contents)
        if self.config.nce == "clip":
            rows = batch.contrast(ids, all_contents, temperature)
            columns = batch.contrast(contents, batch.everyone(ids), temperature)
            return ((rows + columns) / (2 * batch.size)).float()
        similar = ids @ all_contents.t() / temperature
        mine = torch.arange(len(ids))
        pull = similar.mean(1) if self.config.nce == "released" else similar[mine, batch.numbers]
        if batch.size == 1:  # nothing to push away from
            return -pull.sum().float()
        own = torch.zeros_like(similar, dtype=torch.bool)
        own[mine, batch.numbers] = True
        return batch.mean(similar.masked_fill(own, -torch.inf).logsumexp(1) - pull).float()

    def representations(self, histories: Histories) -> Representations:
        config, table = self.config, self.block("item").detach()
        blocks = {"id": table}
        if "mm" in self._ranked:
            blocks["mm"] = self.dense_module(lambda net: self._content(net, None))
        inputs = torch.cat([blocks[view] for view in self._ranked], 1)
        noisy = config.gumbel == "open" and config.noise_in_evaluation

        def read(net: TwoViews, rows: torch.Tensor, real: torch.Tensor, users: np.ndarray) -> torch.Tensor:
            found = []
            for view, x in zip(self._ranked, rows.split(config.dim, -1), strict=True):
                noise = self.draws.evaluation(users, view, config.interests, net.tokens) if noisy else None
                found.append(net.interests(view, x, real, noise)[0])
            return torch.stack(found, 1)

        def interests(rows: torch.Tensor, real: torch.Tensor, users: np.ndarray) -> torch.Tensor:
            out: torch.Tensor = self.dense_module(lambda net: read(net, rows, real, users))
            return out

        users = user_vectors(self.space, histories, config.length, inputs, interests)
        items = inputs.unflatten(1, (len(self._ranked), config.dim))
        if config.pad_collision:  # one more column, zero except for item 0, which it gives the lowest score
            users, items = (
                torch.nn.functional.pad(rows, (0, 1), value=value) for rows, value in ((users, 1), (items, 0))
            )
            items[self.space.place("item", torch.tensor([0])), :, -1] = _NEVER
        return Representations(users, items.contiguous())

    def score(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Scores `[users, items]`: inner products with the best-matching interest, added over views.

        Args:
            users: interests `[users, views, K, dim]`.
            items: item vectors `[items, views, dim]`.
        """
        interests = users.shape[2]
        best = [
            (users[:, view].flatten(0, 1) @ items[:, view].t()).unflatten(0, (-1, interests)).amax(1)
            for view in range(items.shape[1])
        ]
        return torch.stack(best).sum(0)

    def branches(self) -> dict[str, slice]:
        return {view: slice(place, place + 1) for place, view in enumerate(VIEWS)} if len(self._ranked) == 2 else {}
