"""Fetches rows from their owners, and pushes contributions back to them, which is the adjoint.

An exchange fixes *which* rows a rank needs. `fetch` turns the ranks' blocks into the needed rows. `push` turns
contributions to the needed rows into my block of their sum over ranks. There are two strategies with the same result:
gather every row, or send only the rows that some rank needs. `planned_exchange` counts the bytes of both and takes the
second if it saves a fifth or more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from distrec.parallel.linear import linear
from distrec.parallel.partition import Partition
from distrec.parallel.world import World

# A boundary exchange copies the needed rows one by one and adds them back one by one. Gathering whole blocks avoids
# these passes over memory. When nearly all rows were needed, a boundary exchange took 1.1 to 1.3 times the time and 1.4
# to 1.6 times the memory of gathering, for propagation over 2 M nodes (benchmarks/scale.py, with this value at 1.0).
_WORTH_PICKING = 0.8


class Exchange(ABC):
    """The rows of a partitioned array that this rank needs, and how it gets them.

    Attributes:
        strategy: the strategy's name, for the run record.
        needed: the number of rows that `fetch` returns.
        received: the number of rows from other ranks per fetch (bytes = received x width x element size).
    """

    strategy: str
    needed: int
    received: int

    @abstractmethod
    def fetch_values(self, block: torch.Tensor) -> torch.Tensor:
        """The needed rows `[needed, …]` from all ranks' blocks `[my rows, …]`; no gradient."""

    @abstractmethod
    def push_values(self, rows: torch.Tensor) -> torch.Tensor:
        """My block `[my rows, …]` of the sum over ranks of contributions `[needed, …]`; no gradient."""

    def fetch(self, block: torch.Tensor) -> torch.Tensor:
        """`fetch_values` with gradient."""
        return linear(block, self.fetch_values, self.push_values)


class GatherExchange(Exchange):
    """Every rank gets every row, in global order."""

    strategy = "gather"

    def __init__(self, world: World, partition: Partition):
        self.world, self.partition = world, partition
        self.needed = partition.total
        self.received = partition.block * (world.size - 1)

    def fetch_values(self, block: torch.Tensor) -> torch.Tensor:
        return self.world.gather_blocks(block, self.partition)

    def push_values(self, rows: torch.Tensor) -> torch.Tensor:
        return self.world.reduce_blocks(rows, self.partition)


class BoundaryExchange(Exchange):
    """Each rank gets its own list of rows.

    Args:
        needed_by: the global rows that each rank needs: `size` int64 tensors, each ascending and without repeats.
    """

    strategy = "boundary"

    def __init__(self, world: World, partition: Partition, needed_by: Sequence[torch.Tensor]):
        self.world, self.partition = world, partition
        mine = needed_by[world.rank]
        start, stop = partition.start(world.rank), partition.stop(world.rank)
        lists = [rows[(rows >= start) & (rows < stop)] - start for rows in needed_by]
        self._send_rows = torch.cat(lists)
        self._send = [len(rows) for rows in lists]
        self._receive = torch.bincount(partition.owner(mine), minlength=world.size).tolist()
        self.needed = len(mine)
        self.received = self.needed - self._receive[world.rank]

    def fetch_values(self, block: torch.Tensor) -> torch.Tensor:
        return self._deliver(block.index_select(0, self._send_rows))

    def push_values(self, rows: torch.Tensor) -> torch.Tensor:
        back = self._send_back(rows)
        out = back.new_zeros(self.partition.count(self.world.rank), *back.shape[1:])
        return out.index_add_(0, self._send_rows, back)

    def fetch_all(self, blocks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """`fetch` for several arrays `[my rows, width]`, with one message per rank for all of them."""
        rows = torch.cat([block.index_select(0, self._send_rows) for block in blocks], 1)
        delivered = linear(rows, self._deliver, self._send_back)
        return list(delivered.split([block.shape[1] for block in blocks], 1))

    def _deliver(self, rows: torch.Tensor) -> torch.Tensor:
        return self.world.all_to_all(rows, self._send, self._receive)

    def _send_back(self, rows: torch.Tensor) -> torch.Tensor:
        return self.world.all_to_all(rows, self._receive, self._send)


def counted_rows(world: World, partition: Partition, needed: torch.Tensor) -> dict[str, int]:
    """The rows received from other ranks per fetch under each strategy, on the rank that receives the most.

    That rank is the last to finish a collective. Collective; the result is the same on every rank.
    """
    counts = torch.bincount(partition.owner(needed), minlength=world.size)
    remote = counts.sum() - counts[world.rank]
    return {"gather": partition.block * (world.size - 1), "boundary": int(world.max_(remote.clone()))}


def planned_exchange(world: World, partition: Partition, needed: torch.Tensor) -> tuple[Exchange, torch.Tensor]:
    """The cheaper exchange for the rows that this rank needs, and the index of each needed row in its output.

    Collective: every rank passes its own list. The choice is the same on all ranks.

    Args:
        partition: the partition of the rows over the ranks.
        needed: the global numbers of the needed rows, int64, ascending and without repeats.
    """
    gather = GatherExchange(world, partition)
    counted = counted_rows(world, partition, needed)
    if counted["boundary"] >= _WORTH_PICKING * counted["gather"]:
        return gather, needed
    sizes = torch.tensor([len(needed)])
    all_sizes = world.gather_blocks(sizes, Partition(world.size, world.size)).tolist()
    longest = Partition(max(all_sizes) * world.size, world.size)
    padded = torch.full((max(all_sizes),), -1, dtype=torch.int64)
    padded[: len(needed)] = needed
    everyone = world.gather_blocks(padded, longest).view(world.size, -1)
    lists = [everyone[rank, : all_sizes[rank]] for rank in range(world.size)]
    return BoundaryExchange(world, partition, lists), torch.arange(len(needed))


def batch_exchange(
    world: World, partition: Partition, ids_of: Sequence[torch.Tensor]
) -> tuple[BoundaryExchange, torch.Tensor]:
    """An exchange for the rows of one batch, and the index of each of my ids in its output.

    All ranks know the whole batch, so building the exchange needs no communication.

    Args:
        partition: the partition of the rows over the ranks.
        ids_of: the ids of every rank, in any order; repeats are allowed.
    """
    unique = [torch.unique(ids, return_inverse=True) for ids in ids_of]
    exchange = BoundaryExchange(world, partition, [rows for rows, _ in unique])
    return exchange, unique[world.rank][1]
