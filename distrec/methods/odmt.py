"""ODMT (Ji et al., ACM MM 2023): three next-item predictors, from IDs, texts and images.

A transformer over all tokens of an item (`imt`) computes three vectors of it, one per predictor. Each predictor has its
own user encoder. In training, the predictors choose among the batch's items and learn from each other (`distillation`).

Section numbers in brackets refer to docs/methods/odmt.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from distrec.config.bounds import MOST_HEADS, MOST_LAYERS, MOST_LENGTH, MOST_WIDTH
from distrec.data.dataset import Dataset, Interactions
from distrec.data.histories import PADDING, Histories
from distrec.data.sampling import Sampler, UserWindows
from distrec.encoders.base import MODALITIES, Modality, cut_name
from distrec.errors import InputError
from distrec.methods.base import Method, MethodConfig, Representations
from distrec.methods.batch import Targets, WindowBatch
from distrec.methods.distillation import Candidates, distilled_softmax
from distrec.methods.imt import SOURCES, Branches
from distrec.methods.sequential import user_vectors
from distrec.methods.tails import EndToEnd, encoders_to_train, first_tokens
from distrec.methods.workspace import Workspace
from distrec.tables.features import TokenBlock
from distrec.tables.spec import Table, xavier_normal

_AT_ONCE = 1 << 22  # elements of a block's input when all items are encoded for ranking


@dataclass(frozen=True)
class Read:
    """A batch's vectors and targets. A row is a position of my share's windows that has a next item.

    Attributes:
        columns: the candidates' vectors `[columns, 3 dim]`, the same on every worker.
        users: the user vector of each row `[rows, 3 dim]`.
        candidates: what the columns represent.
        user: the window of each row, as a number within my share `[rows]`.
        label: the column of each row's next item `[rows]`.
        column: the column of each place of the batch's windows `[B, length + 1]`, arbitrary where there is no item.
        targets: what the rows of all workers predict.
    """

    columns: torch.Tensor
    users: torch.Tensor
    candidates: Candidates
    user: torch.Tensor
    label: torch.Tensor
    column: torch.Tensor
    targets: Targets


class ODMT(Method):
    """Scores are the mean of the three branches' inner products, without popularity correction."""

    class Config(MethodConfig):
        train_encoder_layers: int = Field(
            0,
            ge=0,
            le=MOST_LAYERS,
            description="number of last layers of both encoders that train too, with the encoders' own dropout; 0 "
            "keeps them frozen",
        )
        text_tokens: str = Field(
            default_factory=lambda known: cut_name("text", known.get("train_encoder_layers", 0)),
            description="token set of texts; by default text-tokens, or text-tokens-cutN where the last N layers train",
        )
        image_tokens: str = Field(
            default_factory=lambda known: cut_name("image", known.get("train_encoder_layers", 0)),
            description="token set of images; by default image-tokens, or image-tokens-cutN where the last N layers "
            "train",
        )
        dim: int = Field(
            768, ge=1, le=MOST_WIDTH, description="D, width of item transformer, MLPs and user encoders (3.2)"
        )
        id_dim: int = Field(
            768,
            ge=1,
            le=MOST_WIDTH,
            description="d_id, width of the ID table; with 'init' 1 to 3, the width of the tokens it starts from (3.1)",
        )
        init: Literal[0, 1, 2, 3] = Field(
            1,
            description="initial ID table: 0 Xavier, 1 mean of first image and text token, 2 first image token, 3 "
            "first text token (3.1)",
        )
        tie_cls_feature: bool = Field(
            False,
            description="with 'init' 2 or 3, the first token follows the ID table as it trains, as in the published "
            "program (3.1)",
        )
        length: int = Field(
            12, ge=1, le=MOST_LENGTH, description="S, number of items read from the end of a history (2)"
        )
        merged_att_layers: int = Field(
            2,
            ge=1,
            le=MOST_LAYERS,
            description="number of blocks of the item transformer (IMT), and of attention heads per block (3.3)",
        )
        version: Literal["v1", "v3"] = Field(
            "v1", description="v1 hides an item's ID token from its text and image tokens; v3 does not (3.3)"
        )
        user_layers: int = Field(2, ge=1, le=MOST_LAYERS, description="number of blocks per user encoder (3.5)")
        user_heads: int = Field(
            2, ge=1, le=MOST_HEADS, description="number of attention heads per block of a user encoder (3.5)"
        )
        dropout: float = Field(
            0.1, ge=0, lt=1, description="dropout rate of item transformer and user encoders (3.3, 3.5)"
        )
        tau: float = Field(0.3, gt=0, description="temperature of the distillation (4)")
        alpha: float = Field(
            20,
            ge=0,
            description="number of epochs until distillation has full weight; below 1, its constant weight; 0: no "
            "distillation (4)",
        )
        negatives: Literal["global", "local"] = Field(
            "global",
            description="candidates in the softmax: global, all items of the batch; local, items of a worker's share, "
            "as published (4)",
        )
        dedupe: bool = Field(
            True,
            description="encode each item once per step; false: once per occurrence, each with its own dropout (9)",
        )

    whole_tables = False
    config: ODMT.Config
    reads_histories = True
    changeable = ("dropout", "tau", "alpha")
    draws_dropout = ("dropout", "train_encoder_layers")

    def __init__(self, config: ODMT.Config, data: Dataset):
        super().__init__(config, data)
        _check_choices(config)
        sets: dict[Modality, str] = {"text": config.text_tokens, "image": config.image_tokens}
        self.encoders = encoders_to_train(data, sets, config.train_encoder_layers)
        self._check_widths()

    def features(self) -> list[str]:
        return [self.config.text_tokens, self.config.image_tokens]

    def sampler(self, train: Interactions, seed: int) -> Sampler:
        return UserWindows(Histories([train], self.data.users), self.config.length + 1, seed)

    def tables(self) -> list[Table]:
        start = self._first_tokens if self.config.init else None
        return [Table("item", "item", self.config.id_dim, xavier_normal, start)]

    def dense(self) -> torch.nn.Module:
        config, (text, image) = self.config, self._widths()
        branches = Branches(
            (config.id_dim, text, image),
            config.dim,
            config.length,
            config.merged_att_layers,
            config.user_layers,
            config.user_heads,
            config.dropout,
            hide_id=config.version == "v1",
        )
        with torch.device("cpu"):  # also where only shapes are asked for: the weights are read from files
            tails = {name: encoder.tail() for name, encoder in self.encoders.items()}
        return EndToEnd(branches, tails) if tails else branches

    def build(self, space: Workspace) -> None:
        super().build(space)
        self.text, self.image = (space.tokens(name, stand_in=not self.encoders) for name in self.features())
        self.log_popularity = self._log_popularity()

    def loss(self, batch: WindowBatch) -> dict[str, torch.Tensor]:
        weight = distillation_weight(self.config.alpha, batch.epoch + 1)
        read = self.read(batch)
        sums = distilled_softmax(
            read.users, read.columns, read.candidates, read.user, read.label, self.config.tau if weight else None
        )
        if self.config.negatives == "global":
            means = sums / len(read.targets)
        else:  # all workers' own means have the same weight, however many rows they have
            means = sums / (max(1, len(read.users)) * read.targets.holders)
        terms = {f"ce_{name}": means[place] for place, name in enumerate(SOURCES)}
        return terms | ({"kd": weight * means[len(SOURCES) :].sum()} if weight else {})

    def read(self, batch: WindowBatch) -> Read:
        """The batch's vectors: of all its items, and of my share's users at each position that predicts."""
        known, targets = batch.next_items()
        real = batch.windows != PADDING
        distinct, number = torch.unique(batch.windows[real], return_inverse=True)
        # A column is a distinct item or, without `dedupe`, a place in the batch's windows.
        ids = distinct if self.config.dedupe else batch.windows[real]
        column = torch.zeros_like(batch.windows)
        column[real] = number if self.config.dedupe else torch.arange(len(ids))
        owned, mine, own = batch.owned(ids), batch.my_rows(column), batch.my_rows(real)
        columns, users = self.dense_module(
            self._items(self.rows("item", owned)[0], *owned.rows(*self._tokens())),
            spread=owned.spread,
            histories=mine[:, :-1],
            real=known,
        )
        counted = column[real] if self.config.negatives == "global" else mine[own]
        candidates = Candidates(
            self.log_popularity[ids],
            torch.bincount(counted, minlength=len(ids)).log(),
            _own(mine, own, ids, distinct),
        )
        return Read(columns, users[known], candidates, known.nonzero()[:, 0], mine[:, 1:][known], column, targets)

    def representations(self, histories: Histories) -> Representations:
        items = self._all_items()

        def newest(rows: torch.Tensor, real: torch.Tensor, users: np.ndarray) -> torch.Tensor:
            vectors = self.dense_module(histories=rows, real=real)[1][:, -1]
            return vectors * real[:, -1:] / len(SOURCES)  # without a history, all items get the same score

        return Representations(user_vectors(self.space, histories, self.config.length, items, newest), items)

    def branches(self) -> dict[str, slice]:
        dim = self.config.dim
        return {name: slice(place * dim, (place + 1) * dim) for place, name in enumerate(SOURCES)}

    def degradations(self) -> list[str]:
        config, missing = self.config, {name: self.data.feature(name).missing for name in self.features()}
        notes = [
            f"{count} of {self.data.items} items lack '{name}'; a zero vector is used as their only token"
            for name, count in missing.items()
            if count
        ]
        if config.dedupe and config.dropout:
            notes.append("a batch encodes each item once, so an item's copies share their dropout ('method.dedupe')")
        if config.negatives == "local":
            notes.append(
                "candidates are the items of a worker's share of the batch, so results depend on the number of workers"
            )
        return notes

    def _widths(self) -> tuple[int, int]:
        if self.encoders:
            return self.encoders["text"].last_width, self.encoders["image"].last_width
        text, image = (self.data.feature(name).width for name in self.features())
        return text, image

    def _check_widths(self) -> None:
        config, (text, image) = self.config, self._widths()
        wanted = {0: [], 1: self.features(), 2: [config.image_tokens], 3: [config.text_tokens]}[config.init]
        if config.init == 1 and text != image:
            raise InputError(
                f"key 'method.init' is 1, the mean of both modalities, but '{config.text_tokens}' is {text} wide and "
                f"'{config.image_tokens}' {image}; use 'method.init' 0, 2 or 3."
            )
        for name in wanted:
            width = text if name == config.text_tokens else image
            if width != config.id_dim:
                raise InputError(
                    f"key 'method.init' is {config.init}, which starts the ID table from '{name}', {width} wide, but "
                    f"'method.id_dim' is {config.id_dim}; set it to {width}, or 'method.init' to 0."
                )

    def _first_tokens(self) -> torch.Tensor:
        """The initial ID table (3.1): my items' first tokens, or their mean over modalities `[my items, id_dim]`."""
        blocks: dict[Modality, TokenBlock] = {"image": self.image, "text": self.text}
        chosen: tuple[Modality, ...] = {1: MODALITIES, 2: MODALITIES[1:], 3: MODALITIES[:1]}[self.config.init]
        if self.encoders:
            return torch.stack([first_tokens(self.encoders[name].tail(), blocks[name]) for name in chosen]).mean(0)
        return torch.stack([blocks[name].values[:, 0].float() for name in chosen]).mean(0)

    def _tokens(self) -> tuple[torch.Tensor, ...]:
        return self.text.values, self.image.values, self.text.mask, self.image.mask

    def _items(
        self,
        ids: torch.Tensor,
        text: torch.Tensor,
        image: torch.Tensor,
        text_mask: torch.Tensor,
        image_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Inputs of the dense module: ID rows with gradient, stored tokens in float32, and which tokens are real."""
        text, image = text.float(), image.float()
        if self.config.tie_cls_feature:
            # In the published program, the table and the frozen features share memory; features have no gradient.
            row = ids.detach().unsqueeze(1)
            if self.config.init == 2:
                image = torch.cat([row, image[:, 1:]], 1)
            else:
                text = torch.cat([row, text[:, 1:]], 1)
        return ids, text, image, torch.cat([text_mask, image_mask], 1)

    def _all_items(self) -> torch.Tensor:
        """My items' vectors `[my items, 3 dim]`, without gradient. Collective: all workers make equally many calls."""
        block, (text, image) = self.block("item").detach(), (self.text, self.image)
        tokens = text.values.shape[1] + image.values.shape[1]
        at_once, out = max(1, _AT_ONCE // (tokens * self.config.dim)), []
        for some in self.space.pieces("item", at_once):
            vectors, _ = self.dense_module(self._items(block[some], *(x[some] for x in self._tokens())))
            out.append(vectors)
        return torch.cat(out)

    def _log_popularity(self) -> torch.Tensor:
        """Logarithm of each item's popularity `[items]`, its share of training windows' places; 0 for items in none."""
        histories = Histories([self.space.train], self.data.users)
        windows = histories.newest(histories.predictable, self.config.length + 1)
        counts = torch.from_numpy(np.bincount(windows[windows != PADDING], minlength=self.data.items))
        return (counts / counts.sum()).log().where(counts > 0, 0.0).float()


def distillation_weight(alpha: float, epoch: int) -> float:
    """w(ep) of `epoch`, counted from 1: a ramp over `alpha` epochs, or `alpha` itself if it is below 1 (4)."""
    return math.exp(-5 * (1 - min(epoch, alpha) / alpha) ** 2) if alpha >= 1 else alpha


def _own(column: torch.Tensor, real: torch.Tensor, ids: torch.Tensor, distinct: torch.Tensor) -> torch.Tensor:
    """Whether a column's item is in a window, bool `[windows, columns]`.

    Args:
        column: the column of each place `[windows, length]`, valid where `real`.
        real: whether a place holds an item, bool `[windows, length]`.
        ids: the item of each column `[columns]`.
        distinct: the distinct items of `ids`, in ascending order.
    """
    number = torch.searchsorted(distinct, ids)
    held = torch.zeros(len(column), len(distinct), dtype=torch.bool)
    held[real.nonzero()[:, 0], number[column[real]]] = True
    return held[:, number]


def _check_choices(config: ODMT.Config) -> None:
    for key in ("merged_att_layers", "user_heads"):
        heads = getattr(config, key)
        if config.dim % heads:
            raise InputError(
                f"key 'method.dim' is {config.dim}, which {heads} heads ('method.{key}') do not divide; change one of "
                "the two."
            )
    if config.tie_cls_feature and config.train_encoder_layers:
        raise InputError(
            "key 'method.tie_cls_feature' is true, which ties the ID table to a frozen feature, but "
            f"'method.train_encoder_layers' is {config.train_encoder_layers}; set one of them to false or 0."
        )
    if config.tie_cls_feature and config.init in (0, 1):
        raise InputError(
            f"key 'method.tie_cls_feature' is true, but with 'method.init' {config.init} the ID table shares memory "
            "with no feature; use 2 (image) or 3 (text), or set it to false."
        )
