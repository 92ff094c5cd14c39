"""A global batch as a method sees it: row look-ups into any user or item array, on every rank."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from distrec.data.histories import PADDING
from distrec.data.sampling import Samples, Triples, Windows
from distrec.parallel.exchange import BoundaryExchange, batch_exchange
from distrec.parallel.partition import Partition, share
from distrec.parallel.world import World


class Lookup:
    """One or more columns of the batch, such as its users: the ids `[B, …]` of the whole global batch, on every rank.

    A rank's share consists of whole rows of the batch.
    """

    def __init__(self, world: World, partition: Partition, ids: np.ndarray):
        self._world, self._partition = world, partition
        self.ids = torch.from_numpy(ids)
        low, high = share(len(ids), world.rank, world.size)
        self._mine = slice(low, high)

    @property
    def mine(self) -> torch.Tensor:
        """The ids of my share of the batch, `[my rows, …]`."""
        return self.ids[self._mine]

    def rows(self, *blocks: torch.Tensor) -> list[torch.Tensor]:
        """The rows of my share `[my rows, …, width]` from each partitioned array, which is given by my block."""
        if self._world.size == 1:
            found = [block.index_select(0, self.ids.flatten()) for block in blocks]
        else:
            exchange, place = self._share_exchange
            found = [rows.index_select(0, place) for rows in _fetch(exchange, blocks)]
        return [rows.view(*self.mine.shape, rows.shape[-1]) for rows in found]

    def distinct(self, *blocks: torch.Tensor) -> list[torch.Tensor]:
        """The rows of the batch's distinct ids `[distinct, width]`, ascending, from each array; on every rank."""
        if self._world.size == 1:
            return [block.index_select(0, self._unique[0]) for block in blocks]
        return _fetch(self._distinct_exchange, blocks)

    @property
    def place(self) -> torch.Tensor:
        """The place of each of my rows' ids among the distinct ones, `[my rows, …]`."""
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
        shares = [self.ids[slice(*share(len(self.ids), rank, size))].flatten() for rank in range(size)]
        return batch_exchange(self._world, self._partition, shares)

    @cached_property
    def _distinct_exchange(self) -> BoundaryExchange:
        return BoundaryExchange(self._world, self._partition, [self._unique[0]] * self._world.size)


class OwnedRows:
    """A list of ids that every rank knows; each rank works on the ids whose rows it owns.

    The work is done where a row's data is, and only the result is sent.

    Args:
        ids: global numbers `[n]`, in any order, with or without repeats.
    """

    def __init__(self, world: World, partition: Partition, ids: torch.Tensor):
        self._world = world
        owner = partition.owner(ids)
        order = owner.argsort(stable=True)
        self._counts = torch.bincount(owner, minlength=world.size).tolist()
        self._place = torch.empty_like(order)
        self._place[order] = torch.arange(len(order))
        self.mine = ids[order].split(self._counts)[world.rank]
        self._local = self.mine - partition.start(world.rank)

    def rows(self, *blocks: torch.Tensor) -> list[torch.Tensor]:
        """The rows of the ids that I own `[mine, …]` from each partitioned array, which is given by my block."""
        return [block.index_select(0, self._local) for block in blocks]

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """The values of all ids `[n, width]`, in their order, from each rank's `[mine, width]`; with gradient."""
        return self._world.gathered(values, self._counts).index_select(0, self._place)


class Batch:
    """One step's samples, divided into one share per rank.

    Attributes:
        world: the ranks that share it.
        size: number of rows of the global batch.
        rows: number of rows of this batch; fewer than `size` if it is a micro-batch (`train.accumulate`).
        part: number of the micro-batch within the global batch.
        configured: `train.global_batch`; the last batch of an epoch may have fewer rows.
        seed: the run's seed, a key of random draws.
        epoch, step: the current epoch, and the step within it; keys of random draws.
    """

    def __init__(
        self,
        world: World,
        users: Partition,
        items: Partition,
        samples: Samples,
        configured: int,
        seed: int,
        epoch: int,
        step: int,
    ):
        self.world, self._items = world, items
        self.size = self.rows = len(samples.users)
        self.configured, self.part = configured, 0
        self.seed, self.epoch, self.step = seed, epoch, step
        self.users = Lookup(world, users, samples.users)

    @property
    def mine(self) -> range:
        """Which rows of this batch are my share."""
        return range(*share(self.rows, self.world.rank, self.world.size))

    @property
    def counts(self) -> list[int]:
        """Number of rows of every rank's share."""
        shares = (share(self.rows, rank, self.world.size) for rank in range(self.world.size))
        return [stop - start for start, stop in shares]

    def mean(self, per_row: torch.Tensor) -> torch.Tensor:
        """My share of the mean over the global batch of `per_row` `[my rows]`."""
        return per_row.sum() / self.size


class TripleBatch(Batch):
    """(user, positive, negative) triples.

    Attributes:
        users, positives, negatives: the columns.
    """

    def __init__(self, world: World, users: Partition, items: Partition, samples: Triples, *where: int):
        super().__init__(world, users, items, samples, *where)
        self.positives = Lookup(world, items, samples.positives)
        self.negatives = Lookup(world, items, samples.negatives)


class WindowBatch(Batch):
    """A batch of windows, which are stretches of users' histories.

    Attributes:
        windows: item numbers of the whole global batch `[B, L]`, the newest last, -1 for padding.
    """

    def __init__(self, world: World, users: Partition, items: Partition, samples: Windows, *where: int):
        super().__init__(world, users, items, samples, *where)
        self.windows = torch.from_numpy(samples.items)

    def lookup(self, columns: slice = slice(None)) -> Lookup:
        """Some columns of the windows, with item 0 (whose rows the caller masks) in place of padding."""
        ids = self.windows[:, columns]
        return Lookup(self.world, self._items, ids.masked_fill(ids == PADDING, 0).numpy())

    @property
    def real(self) -> torch.Tensor:
        """Whether each place of my rows of the windows holds an item: bool `[my rows, L]`."""
        return self.windows[self.mine.start : self.mine.stop] != PADDING

    def owned(self, ids: torch.Tensor) -> OwnedRows:
        """A list of item ids that every rank knows, for work at the items' owners."""
        return OwnedRows(self.world, self._items, ids)


def batch_of(world: World, users: Partition, items: Partition, samples: Samples, *where: int) -> Batch:
    """The batch of these samples; `where` is `configured, seed, epoch, step`."""
    if isinstance(samples, Windows):
        return WindowBatch(world, users, items, samples, *where)
    return TripleBatch(world, users, items, samples, *where)


def _fetch(exchange: BoundaryExchange, blocks: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Rows of several arrays in one exchange."""
    return exchange.fetch_all(blocks) if len(blocks) > 1 else [exchange.fetch(blocks[0])]
