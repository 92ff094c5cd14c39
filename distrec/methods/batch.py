"""A global batch as a method sees it: row look-ups into any user or item array, on every rank."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from distrec.data.sampling import Triples
from distrec.parallel.exchange import BoundaryExchange, batch_exchange
from distrec.parallel.partition import Partition, share
from distrec.parallel.world import World


class Lookup:
    """One column of the batch (its users, say): `ids` `[B]` of the whole global batch, known to every rank."""

    def __init__(self, world: World, partition: Partition, ids: np.ndarray):
        self._world, self._partition = world, partition
        self.ids = torch.from_numpy(ids)
        low, high = share(len(ids), world.rank, world.size)
        self._mine = slice(low, high)

    @property
    def mine(self) -> torch.Tensor:
        """The ids of my share of the batch, `[my rows]`."""
        return self.ids[self._mine]

    def rows(self, *blocks: torch.Tensor) -> list[torch.Tensor]:
        """For each partitioned array, given by my block, the rows of my share of the batch `[my rows, width]`."""
        if self._world.size == 1:
            return [block.index_select(0, self.ids) for block in blocks]
        exchange, place = self._share_exchange
        return [rows.index_select(0, place) for rows in _fetch(exchange, blocks)]

    def distinct(self, *blocks: torch.Tensor) -> list[torch.Tensor]:
        """For each array, the rows of the whole batch's distinct ids `[distinct, width]`, ascending, on every rank."""
        if self._world.size == 1:
            return [block.index_select(0, self._unique[0]) for block in blocks]
        return _fetch(self._distinct_exchange, blocks)

    @property
    def place(self) -> torch.Tensor:
        """Where each of my rows' ids stands among the distinct ones, `[my rows]`."""
        return self._unique[1][self._mine]

    @property
    def counts(self) -> torch.Tensor:
        """How often each distinct id occurs in the whole batch, `[distinct]` float32."""
        return self._unique[2].to(torch.float32)

    def my_distinct(self) -> slice:
        """My share of the distinct ids, for work that is divided among ranks row by row."""
        return slice(*share(len(self._unique[0]), self._world.rank, self._world.size))

    @cached_property
    def _unique(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids, place, counts = torch.unique(self.ids, return_inverse=True, return_counts=True)
        return ids, place, counts

    @cached_property
    def _share_exchange(self) -> tuple[BoundaryExchange, torch.Tensor]:
        size = self._world.size
        shares = [self.ids[slice(*share(len(self.ids), rank, size))] for rank in range(size)]
        return batch_exchange(self._world, self._partition, shares)

    @cached_property
    def _distinct_exchange(self) -> BoundaryExchange:
        return BoundaryExchange(self._world, self._partition, [self._unique[0]] * self._world.size)


class Batch:
    """One step's (user, positive, negative) triples, cut into one share per rank.

    Attributes:
        size: rows of the global batch.
        configured: `train.global_batch`, which the last batch of an epoch may fall short of.
        seed, epoch, step: of the run, and where in training it stands; keys of random draws.
    """

    def __init__(
        self,
        world: World,
        users: Partition,
        items: Partition,
        triples: Triples,
        configured: int,
        seed: int,
        epoch: int,
        step: int,
    ):
        self.size, self.configured = len(triples.users), configured
        self.seed, self.epoch, self.step = seed, epoch, step
        self.users = Lookup(world, users, triples.users)
        self.positives = Lookup(world, items, triples.positives)
        self.negatives = Lookup(world, items, triples.negatives)

    def mean(self, per_row: torch.Tensor) -> torch.Tensor:
        """My share of the mean over the global batch of `per_row` `[my rows]`."""
        return per_row.sum() / self.size


def _fetch(exchange: BoundaryExchange, blocks: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Rows of several arrays in one exchange."""
    return exchange.fetch_all(blocks) if len(blocks) > 1 else [exchange.fetch(blocks[0])]
