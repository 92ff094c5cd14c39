"""The method contract: what a recommender declares about itself, and what it may use.

A method never sees ranks, collectives, optimizers or checkpoints. It names its tables and its dense module. It writes
its loss with `block` (my rows of a table), the graphs' products, the batch's `rows` and `distinct` look-ups, and the
verbs of its workspace. There is one rule: **every loss term is my share, and the sum over workers is the term**. A
mean over the batch is `batch.mean(per_row)`. A value that is not a sum over rows, such as a norm, is computed from a
sum that `space.total` made global, and is returned as `space.share(value)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field

from distrec.config import Section
from distrec.data.dataset import Dataset, Interactions
from distrec.data.histories import Histories
from distrec.data.sampling import PairSampler, Sampler, TripleSampler
from distrec.errors import InputError
from distrec.methods.batch import Lookup, OwnedRows
from distrec.methods.workspace import Workspace
from distrec.tables.spec import Side, Table


class MethodConfig(Section):
    """Base of a method's own settings, `method.*` in the run config."""

    name: str = Field(description="name of the method, such as lightgcn")


@dataclass
class Representations:
    """My rows of user and item vectors, `[my users, …]` and `[my items, …]`, for ranking and export."""

    users: torch.Tensor
    items: torch.Tensor


class Graph(Protocol):
    """What the run record needs from a method's sparse matrices."""

    def record(self) -> dict[str, Any]: ...


class Method(ABC):
    """A recommender.

    `tables`, `dense`, `sampler` and what a method says of itself need only the config and the dataset. On a worker, the
    engine calls `build`, then `attach`; `loss` and `representations` follow.
    """

    Config: ClassVar[type[MethodConfig]]
    trainable: ClassVar[bool] = True
    """False for methods without a loss: they are evaluated without training."""
    whole_tables: ClassVar[bool] = True
    """Whether the loss uses whole tables; if not, `optimizer.tables: sparse` is possible."""
    changeable: ClassVar[tuple[str, ...]] = ()
    """Settings that only the loss reads, so that they may change while a run trains (`changes`)."""
    sum_over_rows: ClassVar[bool] = False
    """Whether every loss term is a sum over the batch's rows, in which each row's part is divided by `batch.size` and
    does not depend on other rows. Only then can a batch be split into micro-batches (`train.accumulate`)."""
    reads_histories: ClassVar[bool] = False
    """Whether it trains on users' histories or ranks by them: then no held-out row may be older than its history."""
    negatives_from: ClassVar[Literal["train", "all", "nothing"]] = "train"
    """Where the negatives of the default sampler come from; with "nothing", batches have none (`PairBatch`)."""
    draws_dropout: ClassVar[tuple[str, ...]] = ("dropout",)
    """Settings that, if not 0, make each worker draw dropout of its own, so that results depend on their number."""

    space: Workspace
    _block: Callable[[str], torch.Tensor]
    _rows: Callable[..., list[torch.Tensor]]
    dense_module: Callable[..., Any]

    def __init__(self, config: Any, data: Dataset):
        self.config, self.data = config, data

    def title(self) -> str:
        """The name shown in banner and results, with the variant if the variants are different methods."""
        name: str = self.config.name
        return name

    def features(self) -> list[str]:
        """Names of the feature sets it reads; their files are verified before a run starts."""
        return []

    def tables(self) -> list[Table]:
        """The tables it trains."""
        return []

    def sampler(self, train: Interactions, seed: int) -> Sampler:
        """The sampler that makes an epoch's samples from the training split."""
        if self.negatives_from == "nothing":
            return PairSampler(train, seed)
        return TripleSampler(train, self.data.items, seed, self.negatives_from)

    def dense(self) -> torch.nn.Module | None:
        """The module that DeepSpeed trains, written for one device. The method calls it as `self.dense_module(…)`."""
        return None

    def build(self, space: Workspace) -> None:
        """Build graphs and read features on this worker. Overriding methods call this one first."""
        self.space = space

    def start_epoch(self, seed: int, epoch: int) -> None:  # noqa: B027  # most methods do nothing then
        """Called before the first step of an epoch, and before the first one after a restart within it. Collective.

        Args:
            seed: the run's seed. Random draws are keyed by it and the epoch, so that a restart repeats them.
            epoch: the epoch's number, from 0.
        """

    def attach(
        self,
        block: Callable[[str], torch.Tensor],
        rows: Callable[..., list[torch.Tensor]],
        dense_module: Callable[..., Any],
    ) -> None:
        """Give the method access to its tables and dense module; the engine calls this once both exist."""
        self._block, self._rows, self.dense_module = block, rows, dense_module

    def block(self, table: str) -> torch.Tensor:
        """My rows of a table, `[my rows, dim]`, with gradient."""
        return self._block(table)

    def rows(self, table: str, *lookups: Lookup | OwnedRows) -> list[torch.Tensor]:
        """For each look-up, the rows of a table for my share of the batch `[my rows, …, dim]`, with gradient.

        The rows come from their owners. Call it once per table and step, because a sparse table is updated once,
        inside the backward pass.
        """
        return self._rows(table, *lookups)

    def trained_features(self, name: str) -> Table:
        """A table `name` that starts from a feature set's rows and trains, for methods with a setting `fill`."""
        width = self.data.feature(name).width
        return Table(name, "item", width, start=lambda: self.space.features(name, self.config.fill))

    def kept(self) -> dict[str, tuple[Side, torch.Tensor]]:
        """Arrays that a checkpoint must hold besides the tables, by name: their side and my rows.

        The rows are the live tensors, not copies: restoring a checkpoint writes into them.
        """
        return {}

    @abstractmethod
    def representations(self, histories: Histories) -> Representations:
        """My rows of the vectors that `score` compares. Evaluation and export call it without gradient.

        Args:
            histories: each user's items before the split that is ranked, for methods that read histories.
        """

    def loss(self, batch: Any) -> dict[str, torch.Tensor]:
        """My share of each term of the objective, by name; training minimises their sum."""
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def score(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Scores `[users, items]` of rows of both representations: inner products unless a method overrides this."""
        return users @ items.t()

    def branches(self) -> dict[str, slice]:
        """The predictors that `score` joins, by name: the columns of the representations that each one uses."""
        return {}

    def graphs(self) -> dict[str, Graph]:
        """Its graphs by name, for the run record."""
        return {}

    def degradations(self) -> list[str]:
        """Approximations and fill-ins of this method with this data, one sentence each.

        Overriding methods add to these. A method with `features()` has a setting `fill`, the rule for missing rows.
        """
        rules = {"mean": "the mean of the others", "zeros": "zeros"}
        missing = {name: self.data.feature(name).missing for name in self.features()}
        return [
            f"{count} of {self.data.items} items lack feature '{name}', filled with {rules[self.config.fill]}"
            for name, count in missing.items()
            if count
        ]


def require_features(data: Dataset, names: list[str], method: str) -> None:
    """Check that the dataset has the features a method asks for, one vector per item.

    Raises:
        InputError: the list is empty, or a feature set is absent or has several vectors per item.
    """
    if not names:
        raise InputError(
            f"key 'method.features' is empty but {method} needs at least one feature set; name one, such as 'text'."
        )
    for name in names:
        if (tokens := data.feature(name).tokens) > 1:
            raise InputError(
                f"key 'method.features' names '{name}', which has {tokens} vectors per item, but {method} reads one; "
                "name a set that 'distrec encode' writes without --tokens, such as 'text'."
            )


def require_tokens(data: Dataset, names: Mapping[str, str], method: str) -> None:
    """Check that the dataset has the token sets a method asks for: several vectors per item.

    Args:
        names: names of the sets, by the config key that names each.

    Raises:
        InputError: a set is absent or has one vector per item.
    """
    for key, name in names.items():
        entry = data.manifest.features.get(name)
        if entry is None or entry.tokens == 1:
            state = "is not in the dataset" if entry is None else "has one vector per item"
            raise InputError(
                f"key '{key}' is '{name}', which {state}, but {method} reads several vectors per item; "
                f"run 'distrec encode {data.folder} --tokens' and name a set it writes, such as 'text-tokens'."
            )
