"""A process group of one process that takes the place of one rank among many, so that a rank's memory can be measured.

Rank 0 does everything that it would do in a group of `size` processes: it has its own rows only, and allocates what it
sends and receives. Nobody is there to answer, so the group answers itself, with bytes of the right number. Where others
would send rows, it repeats rows of rank 0. A sum over ranks is rank 0's part of it. So numbers are wrong and sizes are
right, and losses stay finite.
"""

# mypy: disable-error-code="override"
# torch's stubs list overloads that it calls only from Python code of its users.
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from distrec.sizing.torch_internals import finished, gather_objects, name_of
from distrec.training.dense import leave_group

_NAME = "standin"


class StandIn(dist.ProcessGroup):
    """Rank 0 of `size` processes, of which no other exists.

    Attributes:
        received: bytes that rank 0 has got from others, or would have, with rings for the sums as in gloo.
    """

    def __init__(self, size: int):
        super().__init__(0, size)  # type: ignore[call-arg]
        self._ranks = size
        self.received = 0
        self._expected: list[torch.Tensor] = []

    @property
    def group_name(self) -> str:
        return name_of(self)

    def getBackendName(self) -> str:
        return _NAME

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> Any:
        self._count(sum(tensor.nbytes for tensor in tensors) * 2 * (self._ranks - 1) // self._ranks)
        return finished(tensors)

    def allreduce_coalesced(self, tensors: list[torch.Tensor], opts: Any = None) -> Any:
        return self.allreduce(tensors)

    def reduce(self, tensors: list[torch.Tensor], opts: Any = None) -> Any:
        return self.allreduce(tensors)

    def broadcast(self, tensors: list[torch.Tensor], opts: Any = None) -> Any:
        if opts is not None and opts.rootRank != 0:
            for tensor in tensors:
                self._count(tensor.nbytes)
                tensor.zero_()
        return finished(tensors)

    def barrier(self, opts: Any = None) -> Any:
        return finished([])

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None) -> Any:
        for parts, mine in zip(outputs, inputs, strict=True):
            for part in parts:
                _repeat(mine, part)
            self._count((len(parts) - 1) * mine.nbytes)
        return finished(inputs)

    def all_gather_single(self, output: torch.Tensor, mine: torch.Tensor, opts: Any = None) -> Any:
        return self.allgather([list(output.view(-1).chunk(self._ranks))], [mine])

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        for output, mine in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, mine)
        return finished(list(inputs))

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        for output, parts in zip(outputs, inputs, strict=True):
            output.copy_(parts[0])
            self._count((self._ranks - 1) * output.nbytes)
        return finished(list(outputs))

    def reduce_scatter_single(self, output: torch.Tensor, whole: torch.Tensor, opts: Any = None) -> Any:
        return self.reduce_scatter([output.view(-1)], [list(whole.view(-1).chunk(self._ranks))])

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        for output, whole in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, whole)
        return finished(list(outputs))

    def all_to_all_single(
        self, output: torch.Tensor, mine: torch.Tensor, receive: Sequence[int], send: Sequence[int], opts: Any = None
    ) -> Any:
        # What I send to myself is valid for me, such as numbers of rows that I own, so others send the same.
        own_in = send[0] if send else len(mine) // self._ranks
        own_out = receive[0] if receive else len(output) // self._ranks
        _repeat(mine[:own_in], output)
        self._count(output.nbytes - output[:own_out].nbytes)
        return finished([output])

    def alltoall(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None) -> Any:
        for output in outputs:
            _repeat(inputs[0], output)
        self._count(sum(output.nbytes for output in outputs[1:]))
        return finished(outputs)

    def send(self, tensors: list[torch.Tensor], to: int, tag: int = 0) -> Any:
        for tensor in tensors:
            for waiting in self._expected:
                _repeat(tensor, waiting)
        self._expected.clear()
        return finished(tensors)

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int = 0) -> Any:
        for tensor in tensors:
            tensor.zero_()
            self._count(tensor.nbytes)
        self._expected = tensors  # the next send has what an equal peer would have sent
        return finished(tensors)

    def _count(self, received: int) -> None:
        self.received += received


def _repeat(rows: torch.Tensor, into: torch.Tensor) -> None:
    """Fill `into` with the values of `rows`, again and again; with zeros if there are none."""
    values, target = rows.detach().reshape(-1), into.detach().view(-1)
    if not len(values):
        target.zero_()
        return
    for start in range(0, len(target), len(values)):
        count = min(len(values), len(target) - start)
        target[start : start + count].copy_(values[:count])


@contextmanager
def standing_in(size: int) -> Iterator[StandIn]:
    """A context in which this process's default group is a `StandIn` for rank 0 of `size` processes."""
    made: list[StandIn] = []

    def create(store: Any, rank: int, ranks: int, timeout: Any) -> StandIn:
        made.append(StandIn(ranks))
        return made[-1]

    dist.Backend.register_backend(_NAME, create, devices=["cpu"])
    dist.init_process_group(_NAME, store=dist.HashStore(), rank=0, world_size=size)
    plain = dist.all_gather_object
    # TorchRec checks that the shards that it hears of make up the whole table.
    dist.all_gather_object = gather_objects  # type: ignore[assignment]
    try:
        yield made[0]
    finally:
        dist.all_gather_object = plain
        leave_group()
