"""Everything that the stand-in for other workers relies on in `torch.distributed` beyond what it documents.

`tests/sizing/test_standin.py` fails if a new version of torch changes this.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d
from torch.distributed import distributed_c10d
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata


def finished(tensors: list[torch.Tensor]) -> Any:
    """The handle of a collective's work that has ended; groups that are written in C++ make it in C++."""
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(tensors)
    return _distributed_c10d._create_work_from_future(future)  # type: ignore[attr-defined]


def name_of(group: dist.ProcessGroup) -> str:
    """The name under which torch knows a group; a group that is written in Python has to find it by itself."""
    return str(distributed_c10d._get_process_group_name(group))


def gather_objects(gathered: list[Any], mine: Any, group: Any = None) -> None:
    """In place of `all_gather_object`: fill `gathered` with what each rank would say, given what rank 0 says.

    Relies on the description of a shard that TorchRec gathers: it checks that the shards make up the whole tensor.
    """
    for rank in range(len(gathered)):
        gathered[rank] = _of_rank(mine, rank) if isinstance(mine, ShardedTensorMetadata) else mine


def _of_rank(mine: ShardedTensorMetadata, rank: int) -> ShardedTensorMetadata:
    theirs = copy.deepcopy(mine)
    for shard in theirs.shards_metadata:
        rows, block = mine.size[0], shard.shard_sizes[0]
        start = min(rank * block, rows)
        shard.shard_offsets = [start, *shard.shard_offsets[1:]]
        shard.shard_sizes = [min(block, rows - start), *shard.shard_sizes[1:]]
        shard.placement = f"rank:{rank}/cpu"  # type: ignore[assignment]  # as TorchRec writes it
    return theirs
