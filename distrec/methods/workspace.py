"""What a method may use on one worker: the data, draws, graphs, and sums over all workers.

Arrays with a row per user or per item are divided into blocks of rows, and each worker holds one block: *my rows*. A
method computes with my rows, and the verbs here do what needs other workers. It need not know how many there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from distrec.data import keyed
from distrec.data.dataset import Dataset, Interactions
from distrec.data.ordered import distinct
from distrec.data.storage import open_folder
from distrec.graph.cache import cached_neighbours
from distrec.graph.knn import Neighbours, cosine_neighbours
from distrec.graph.matrix import ShardedMatrix
from distrec.graph.neighbours import Normalisation, item_graph
from distrec.graph.user_item import UserItemGraph
from distrec.methods.batch import Targets
from distrec.methods.losses import gram_distance, info_nce
from distrec.methods.moments import population_moments
from distrec.methods.softmax import full_softmax
from distrec.parallel.partition import Partition
from distrec.parallel.world import World
from distrec.tables.features import Fill, TokenBlock, feature_block, token_block, unit_rows
from distrec.tables.spec import Side
from distrec.tables.whitening import whitened


@dataclass(frozen=True)
class Workspace:
    """One worker's part of everything that a method works on. All verbs are collective unless they say otherwise.

    Attributes:
        world: the workers; methods do not use it.
        data: the prepared dataset.
        train: the training interactions, all of them on every worker.
        graphs: folder in which neighbour lists are shared between runs; None: they are not.
    """

    world: World
    data: Dataset
    train: Interactions
    graphs: str | None = None

    @cached_property
    def partitions(self) -> dict[Side, Partition]:
        """Which worker has which users and which items; methods do not use it."""
        return {
            "user": Partition(self.data.users, self.world.size),
            "item": Partition(self.data.items, self.world.size),
        }

    @property
    def users(self) -> Partition:
        """The partition of the users; methods do not use it."""
        return self.partitions["user"]

    @property
    def items(self) -> Partition:
        """The partition of the items; methods do not use it."""
        return self.partitions["item"]

    # What is mine. None of these is collective.

    def count(self, side: Side) -> int:
        """The number of all users or of all items."""
        return self.partitions[side].total

    def mine(self, side: Side) -> range:
        """The numbers of my users or items."""
        partition, rank = self.partitions[side], self.world.rank
        return range(partition.start(rank), partition.stop(rank))

    def my_count(self, side: Side) -> int:
        """The number of my users or items, which may be 0."""
        return len(self.mine(side))

    def my_rows(self, side: Side, whole: torch.Tensor) -> torch.Tensor:
        """My rows `[my rows, …]` of an array that every worker has, `[all rows, …]`."""
        mine = self.mine(side)
        return whole[mine.start : mine.stop]

    def place(self, side: Side, numbers: torch.Tensor) -> torch.Tensor:
        """The places in my block of those of the given users or items that are mine, in the order given."""
        mine = self.mine(side)
        return numbers[(numbers >= mine.start) & (numbers < mine.stop)] - mine.start

    def pieces(self, side: Side, most: int) -> Iterator[slice]:
        """Consecutive pieces of my block of at most `most` rows: as many on every worker, so the last may be empty.

        Between them, all workers may take part in collective calls.
        """
        for low in range(0, self.partitions[side].block, most):
            yield slice(low, low + most)

    # Content.

    def features(self, name: str, fill: Fill) -> torch.Tensor:
        """My items' rows of feature set `name`, `[my items, width]` float32; missing ones are filled by the rule."""
        return feature_block(self.world, self.items, self.data, name, fill)

    def tokens(self, name: str, stand_in: bool = True) -> TokenBlock:
        """My items' rows of token set `name`; without a modality, a zero vector stands in for its first token."""
        return token_block(self.world, self.items, self.data, name, stand_in)

    def whitened(self, block: torch.Tensor, dim: int, name: str) -> torch.Tensor:
        """The first `dim` left singular vectors of all items' centred features, times sqrt(items / dim).

        Args:
            block: my items' features `[my items, width]`.
            name: the feature set's name, for the error message.

        Returns:
            My rows, `[my items, dim]` float32.

        Raises:
            InputError: the features have fewer than `dim` independent directions.
        """
        return whitened(self.world, self.items, block, dim, name)

    # Graphs.

    def distinct_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Users and items of the training interactions, int64 `[pairs]` each, ascending and without repeats.

        Every worker has all of them; not collective.
        """
        items = self.count("item")
        pairs = distinct(self.train.user.astype(np.int64) * items + self.train.item)
        return pairs // items, pairs % items

    def user_item(self, user: np.ndarray | None = None, item: np.ndarray | None = None) -> UserItemGraph:
        """The user-item graph of the training interactions, or of the given pairs `[pairs]`.

        Every worker passes the same pairs; a repeated one counts as often as it occurs. A method may build several
        graphs: train on one, rank on another.
        """
        user = self.train.user if user is None else user
        item = self.train.item if item is None else item
        return UserItemGraph(self.world, self.users, self.items, user, item)

    def neighbours(
        self, block: torch.Tensor, k: int, made_of: Mapping[str, Any], include_self: bool = True
    ) -> Neighbours:
        """The k most similar items of each of mine, as `cosine_neighbours` finds them.

        The lists are stored in the folder `run.graphs`, if that is set, and read from there the next time.

        Args:
            block: my items' vectors of unit length, `[my items, width]`.
            k: number of neighbours per item.
            made_of: everything besides the dataset that determines `block` (names of feature sets, fill rule, further
                steps), as a JSON value. Methods that give the same value share their lists, so their blocks must be
                bit-identical.
            include_self: whether an item counts among its own neighbours.
        """
        if self.graphs is None:
            return cosine_neighbours(self.world, self.items, block, k, include_self)
        whole = {"data": self.data.hash, **made_of}
        return cached_neighbours(open_folder(self.graphs), self.world, self.items, whole, block, k, include_self)

    def feature_neighbours(
        self, rows: torch.Tensor, name: str, fill: Fill, k: int, include_self: bool = True
    ) -> Neighbours:
        """The k items most similar to each of mine by the cosine of one feature set; see `neighbours`.

        Args:
            rows: `features(name, fill)`.
        """
        made_of = {"features": [name], "fill": fill, "rows": "unit rows"}
        return self.neighbours(unit_rows(rows), k, made_of, include_self)

    def item_graph(
        self, lists: Sequence[Neighbours], normalisation: Normalisation, weights: Sequence[float] | None = None
    ) -> ShardedMatrix:
        """A graph of the items from neighbour lists, one per modality: `distrec.graph.neighbours.item_graph`."""
        return item_graph(self.world, self.items, lists, normalisation, weights)

    def matrix(
        self, rows: Side, columns: Side, row: np.ndarray, column: np.ndarray, value: np.ndarray
    ) -> ShardedMatrix:
        """A sparse matrix between two sides.

        Args:
            rows, columns: the sides.
            row, column: the numbers of each entry's row and column `[entries]`; entries of others' rows are left out.
            value: their weights `[entries]`.
        """
        mine = self.mine(rows)
        own = (row >= mine.start) & (row < mine.stop)
        return ShardedMatrix(
            self.world, self.partitions[rows], self.partitions[columns], row[own], column[own], value[own]
        )

    # Random numbers that do not depend on the number of workers; not collective.

    def uniform(self, side: Side, width: int, key: tuple[str | int, ...]) -> torch.Tensor:
        """Draws in [0, 1) for my rows of a side, `[my rows, width]` float32.

        Args:
            key: what the draws are for, such as `batch.key("noise")`; another key gives other draws.
        """
        return torch.from_numpy(keyed.uniform_rows((*key, side), self.mine(side), width))

    def normal(self, side: Side, width: int, key: tuple[str | int, ...]) -> torch.Tensor:
        """Standard normal draws for my rows of a side, `[my rows, width]` float32; `key` as for `uniform`."""
        mine = self.mine(side)
        draws = keyed.normal((*key, side), mine.start * width, len(mine) * width)
        return torch.from_numpy(draws.astype(np.float32)).view(len(mine), width)

    def sample(self, weights: np.ndarray, count: int, key: tuple[str | int, ...]) -> np.ndarray:
        """`count` different numbers below `len(weights)`, each drawn with a probability proportional to its weight.

        Every worker gets the same ones, in ascending order (Efraimidis and Spirakis 2006).

        Args:
            weights: positive, float64; the same on every worker.
        """
        waits = -np.log1p(-keyed.uniform(key, 0, len(weights))) / weights
        return np.sort(np.argpartition(waits, count - 1)[:count]) if count else np.empty(0, np.int64)

    # Losses.

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over workers of `value`, the same on all of them, with gradient."""
        return self.world.total(value)

    def share(self, value: torch.Tensor) -> torch.Tensor:
        """My share of a value that is the same on all workers: the shares add up to it. Not collective."""
        return value / self.world.size

    def any(self, flag: torch.Tensor) -> bool:
        """Whether a bool is true on any worker."""
        return bool(self.world.max_(flag.int()))

    def cross_entropy(self, vectors: torch.Tensor, catalogue: torch.Tensor, targets: Targets) -> torch.Tensor:
        """My share of the sum over the batch of the cross-entropy over all items.

        Args:
            vectors: those of my rows `[my rows, width]`.
            catalogue: my items' vectors `[my items, width]`.
            targets: the item that each row of the batch predicts.
        """
        return full_softmax(vectors, catalogue, targets.items, targets.counts, self.items, self.world)

    def contrast(self, anchors: torch.Tensor, candidates: torch.Tensor, side: Side, temperature: float) -> torch.Tensor:
        """My share of the mean InfoNCE over all rows of a side, from blocks of similarities.

        Args:
            anchors, candidates: my rows of either view `[my rows, width]`, of any length; same rows are the positives.
            temperature: at least 0.03.
        """
        partition = self.partitions[side]
        everyone = self.world.gathered(unit_rows(candidates), partition.counts)
        ones = torch.ones(partition.total)
        total = info_nce(unit_rows(anchors), everyone, ones, self.mine(side).start, temperature)
        return total / partition.total

    def gram_distance(self, vectors: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """My share of `|| V V^T - T T^T ||_F^2` for V `[n, width]` and T, which are the same on every worker.

        Targets get no gradient. Not collective: the work is divided.
        """
        return gram_distance(vectors, targets, self.world)

    def moments(self, tables: Sequence[Sequence[torch.Tensor]], copies: Sequence[int]) -> torch.Tensor:
        """Unbiased variance and mean over all entries of each table `[tables, 2]`: `population_moments`."""
        return population_moments(self.world, tables, copies)
