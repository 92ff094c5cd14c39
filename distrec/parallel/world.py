"""The group of worker processes, with the few collectives the project uses (all of them work on gloo and nccl)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from distrec.parallel.linear import linear
from distrec.parallel.partition import Partition


@dataclass(frozen=True)
class World:
    """My rank among `size` processes of the default process group."""

    rank: int
    size: int

    @classmethod
    def current(cls) -> World:
        """The initialised default group, or one process where there is none."""
        if dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls(0, 1)

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values` over ranks in place; no gradient."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def max_(self, values: torch.Tensor) -> torch.Tensor:
        """Maximum of `values` over ranks in place; no gradient."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `value`, on every rank, with gradient."""
        if self.size == 1:
            return value

        def all_sum(x: torch.Tensor) -> torch.Tensor:
            return self.sum_(x.clone())

        return linear(value, all_sum, all_sum)

    def all_to_all(self, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        """Send `send[r]` consecutive rows to each rank r and return the rows received, in rank order; no gradient."""
        if self.size == 1:
            return rows
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), list(receive), list(send))
        return out

    def gather_blocks(self, block: torch.Tensor, partition: Partition) -> torch.Tensor:
        """All rows of a partitioned array, from every rank's block `[my rows, …]`; no gradient."""
        if self.size == 1:
            return block
        padded = _padded(block, partition.block)
        out = block.new_empty(partition.block * self.size, *block.shape[1:])
        dist.all_gather_single(out, padded)
        return out[: partition.rows]  # starts are rank * block, so padding lies past the end only

    def reduce_blocks(self, rows: torch.Tensor, partition: Partition) -> torch.Tensor:
        """My block of the sum over ranks of `rows` `[all rows, …]`; the adjoint of `gather_blocks`; no gradient."""
        if self.size == 1:
            return rows
        counts = [partition.count(rank) for rank in range(self.size)]
        mine = counts[self.rank]
        parts = self.all_to_all(rows, counts, [mine] * self.size).view(self.size, mine, *rows.shape[1:])
        # Added in rank order, so the result does not depend on the arrival order of messages.
        return parts.sum(0) if self.size > 2 else parts[0] + parts[1]

    def rows_from(self, rank: int, block: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` of `rank`'s block, on every rank; shape and type of rows must agree everywhere."""
        out = block[start:stop].contiguous() if rank == self.rank else block.new_empty(stop - start, *block.shape[1:])
        if self.size > 1:
            dist.broadcast(out, rank)
        return out

    def chunk(self, block: torch.Tensor, partition: Partition, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` (global numbers) of a partitioned array, on every rank, without holding the whole."""
        parts = []
        for rank in range(self.size):
            low, high = max(start, partition.start(rank)), min(stop, partition.stop(rank))
            if low < high:
                parts.append(self.rows_from(rank, block, low - partition.start(rank), high - partition.start(rank)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _padded(block: torch.Tensor, rows: int) -> torch.Tensor:
    if len(block) == rows:
        return block.contiguous()
    out = block.new_zeros(rows, *block.shape[1:])
    out[: len(block)] = block
    return out
