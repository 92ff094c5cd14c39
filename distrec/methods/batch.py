"""A global batch as a method sees it: row look-ups into any user or item array, on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from distrec.data import keyed
from distrec.data.histories import PADDING
from distrec.data.sampling import Pairs, Samples, Triples, Windows
from distrec.methods.losses import info_nce
from distrec.parallel.exchange import BoundaryExchange, batch_exchange
from distrec.parallel.partition import Partition, share
from distrec.parallel.world import World
from distrec.tables.features import unit_rows


@dataclass(frozen=True)
class Targets:
    """The items that the rows of all workers predict.

    Attributes:
        items: one per row, in the order of the workers `[rows of all workers]`; the same on every worker.
        counts: the number of rows of each worker.
    """

    items: torch.Tensor
    counts: list[int]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def holders(self) -> int:
        """The number of workers that have any row."""
        return sum(count > 0 for count in self.counts)


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

    def contrast(self, anchors: torch.Tensor, candidates: torch.Tensor, temperature: float) -> torch.Tensor:
        """My share of InfoNCE summed over the whole batch, in which a repeated id counts as often as it occurs.

        Args:
            anchors, candidates: two views of the distinct ids `[distinct, width]`, of any length, as from `distinct`;
                same rows are the positives.
            temperature: at least 0.03.
        """
        mine = slice(*share(len(self._unique[0]), self._world.rank, self._world.size))
        return info_nce(unit_rows(anchors)[mine], unit_rows(candidates), self.counts, mine.start, temperature)

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
        self._local, self._count = self.mine - partition.start(world.rank), partition.count(world.rank)

    def rows(self, *blocks: torch.Tensor) -> list[torch.Tensor]:
        """The rows of the ids that I own `[mine, …]` from each partitioned array, which is given by my block."""
        return [block.index_select(0, self._local) for block in blocks]

    def placed(self, values: torch.Tensor) -> torch.Tensor:
        """My block `[my rows, width]`: the values `[mine, width]` where distinct ids are, and zeros elsewhere."""
        return values.new_zeros(self._count, values.shape[1]).index_copy(0, self._local, values)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """The values of all ids `[n, width]`, in their order, from each rank's `[mine, width]`; with gradient."""
        return self._world.gathered(values, self._counts).index_select(0, self._place)


@dataclass(frozen=True)
class Step:
    """Which step a batch belongs to.

    Attributes:
        seed: the run's seed, a key of random draws.
        epoch, step: the epoch, and the step within it; keys of random draws.
        size: number of rows of the global batch. The last batch of an epoch may have fewer than the others.
        full_size: `train.global_batch`.
        part: number of this micro-batch within the global batch (`train.accumulate`).
    """

    seed: int
    epoch: int
    step: int
    size: int
    full_size: int
    part: int = 0


class Batch:
    """The samples of one step, or of a micro-batch of it, divided into one share per worker.

    Attributes:
        size: number of rows of the whole global batch. **Divide losses by it**, or use `mean`: with micro-batches it is
            larger than the number of rows at hand.
        full_size: `train.global_batch`, for formulas of published programs that divide by it in short batches too.
        seed, epoch, step, part: keys of random draws.
        users: the column of users.
    """

    def __init__(self, world: World, users: Partition, items: Partition, samples: Samples, at: Step):
        self._world, self._items, self._rows = world, items, len(samples.users)
        self.size, self.full_size = at.size, at.full_size
        self.seed, self.epoch, self.step, self.part = at.seed, at.epoch, at.step, at.part
        self.users = Lookup(world, users, samples.users)
        self._mine = slice(*share(self._rows, world.rank, world.size))

    @property
    def counts(self) -> list[int]:
        """Number of rows of every worker's share."""
        shares = (share(self._rows, rank, self._world.size) for rank in range(self._world.size))
        return [stop - start for start, stop in shares]

    @property
    def numbers(self) -> torch.Tensor:
        """The numbers of my rows within this batch, `[my rows]`."""
        return torch.arange(self._mine.start, self._mine.stop)

    def my_rows(self, whole: torch.Tensor) -> torch.Tensor:
        """My share `[my rows, …]` of an array with a row per row of this batch, which every worker has."""
        return whole[self._mine]

    def mean(self, per_row: torch.Tensor) -> torch.Tensor:
        """My share of the mean over the global batch of `per_row` `[my rows]`."""
        return per_row.sum() / self.size

    def everyone(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all workers in the order of the batch `[rows, …]`, from my share of them, with gradient."""
        return self._world.gathered(rows, self.counts)

    def contrast(self, anchors: torch.Tensor, candidates: torch.Tensor, temperature: float) -> torch.Tensor:
        """My share of InfoNCE summed over the batch, where same rows of both views are the positives.

        Args:
            anchors: my rows of one view, of unit length `[my rows, width]`.
            candidates: all rows of the other one, of unit length `[rows, width]`, as from `everyone`.
            temperature: at least 0.03.
        """
        return info_nce(anchors, candidates, anchors.new_ones(len(candidates)), self._mine.start, temperature)

    def owned(self, ids: torch.Tensor) -> OwnedRows:
        """A list of item ids that every worker knows, for work at the items' owners."""
        return OwnedRows(self._world, self._items, ids)

    def key(self, name: str, *more: str | int) -> tuple[str | int, ...]:
        """The key of this step's draws for `name`; `more` tells several of them apart."""
        return (name, self.seed, self.epoch, self.step, *more)

    def uniform(self, width: int, name: str, *more: str | int) -> torch.Tensor:
        """Draws in [0, 1) for my rows, by their place in the epoch `[my rows, width]`, at any number of workers."""
        first = self.step * self.full_size + self._mine.start
        rows = range(first, first + self._mine.stop - self._mine.start)
        return torch.from_numpy(keyed.uniform_rows((name, self.seed, self.epoch, *more), rows, width))


class PairBatch(Batch):
    """(user, positive) pairs.

    Attributes:
        users, positives: the columns.
    """

    def __init__(self, world: World, users: Partition, items: Partition, samples: Pairs | Triples, at: Step):
        super().__init__(world, users, items, samples, at)
        self.positives = Lookup(world, items, samples.positives)


class TripleBatch(PairBatch):
    """(user, positive, negative) triples.

    Attributes:
        users, positives, negatives: the columns.
    """

    def __init__(self, world: World, users: Partition, items: Partition, samples: Triples, at: Step):
        super().__init__(world, users, items, samples, at)
        self.negatives = Lookup(world, items, samples.negatives)


class WindowBatch(Batch):
    """A batch of windows, which are stretches of users' histories.

    Attributes:
        windows: item numbers of the whole global batch `[B, L]`, the newest last, -1 for padding.
    """

    def __init__(self, world: World, users: Partition, items: Partition, samples: Windows, at: Step):
        super().__init__(world, users, items, samples, at)
        self.windows = torch.from_numpy(samples.items)

    def lookup(self, columns: slice = slice(None)) -> Lookup:
        """Some columns of the windows, with item 0 (whose rows the caller masks) in place of padding."""
        ids = self.windows[:, columns]
        return Lookup(self._world, self._items, ids.masked_fill(ids == PADDING, 0).numpy())

    @property
    def real(self) -> torch.Tensor:
        """Whether each place of my rows of the windows holds an item: bool `[my rows, L]`."""
        return self.my_rows(self.windows) != PADDING

    def last_items(self) -> Targets:
        """Each window predicts its newest item."""
        return Targets(self.windows[:, -1], self.counts)

    def next_items(self) -> tuple[torch.Tensor, Targets]:
        """Each position of the windows `[B, L + 1]` that holds an item predicts the next item.

        Returns:
            Which of my rows' first L positions predict, bool `[my rows, L]`; and the items that all positions predict.
        """
        known = self.windows[:, :-1] != PADDING
        counts = [int(part.sum()) for part in known.sum(1).split(self.counts)]
        return self.my_rows(known), Targets(self.windows[:, 1:][known], counts)


def batch_of(world: World, users: Partition, items: Partition, samples: Samples, at: Step) -> Batch:
    """The batch of these samples."""
    if isinstance(samples, Windows):
        return WindowBatch(world, users, items, samples, at)
    if isinstance(samples, Pairs):
        return PairBatch(world, users, items, samples, at)
    return TripleBatch(world, users, items, samples, at)


def _fetch(exchange: BoundaryExchange, blocks: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Rows of several arrays in one exchange."""
    return exchange.fetch_all(blocks) if len(blocks) > 1 else [exchange.fetch(blocks[0])]
