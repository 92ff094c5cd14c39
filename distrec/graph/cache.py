"""A cache of neighbour lists that runs share: `<run.graphs>/<key>/<number>`, keyed by what the lists are computed from.

Many runs on one dataset need the same lists, above all the trials of a search. Computing them takes products of all
pairs of items, most of such a run's work before its first step. Each file holds the lists of 8,192 items, whatever the
number of workers, and the SHA-256 of its content. A worker reads the files that hold its items. If any file is damaged
or missing, all workers compute the lists again. Every run writes the same bytes, and writes each file as a whole, so
runs may share a folder at any time. Deleting the folder costs only time.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from botocore.exceptions import BotoCoreError

from distrec.config import digest
from distrec.data.storage import Folder, sha256
from distrec.graph.knn import Neighbours, cosine_neighbours
from distrec.parallel.partition import Partition
from distrec.parallel.world import World

_FORMAT = 1  # raise it whenever a change of the code would write other bytes under the same key
_ROWS = 8192
_UNUSABLE = (OSError, BotoCoreError)

NOTE = {"content": "nearest neighbours of items, kept by distrec for runs that name this folder; safe to delete"}


def cached_neighbours(
    folder: Folder,
    world: World,
    partition: Partition,
    made_of: Mapping[str, Any],
    block: torch.Tensor,
    k: int,
    include_self: bool = True,
) -> Neighbours:
    """`cosine_neighbours(world, partition, block, k, include_self)`, read from `folder` if it holds the lists.
    Collective.

    The bits are the same in both cases.

    Args:
        folder: the cache.
        made_of: everything that determines the items' vectors, as a JSON value. Together with the other settings it
            forms the key. The number of workers is not part of it: products do not depend on it, and a mean that fills
            missing rows depends on it only in the last float64 bits.
        block, k, include_self: as for `cosine_neighbours`.
    """
    k = min(k, partition.total if include_self else partition.total - 1)
    # Other builds or processors round differently. Workers that differ in them use different keys, find no complete
    # lists, and compute them.
    build = [torch.__version__, torch.backends.cpu.get_cpu_capability()]
    kept = folder.folder(digest([_FORMAT, dict(made_of), partition.total, k, include_self, build]))
    found = _read(kept, partition, world.rank, k)
    someone_lacks = int(world.max_(torch.tensor(int(found is None))))
    if found is not None and not someone_lacks:
        return found
    computed = cosine_neighbours(world, partition, block, k, include_self)
    _write(kept, world, partition, *computed)
    return computed


def _read(kept: Folder, partition: Partition, rank: int, k: int) -> Neighbours | None:
    """My items' lists; None if a file is missing or damaged."""
    start, stop = partition.start(rank), partition.stop(rank)
    values, items = [np.empty((0, k), np.float32)], [np.empty((0, k), np.int32)]
    for low in range(start - start % _ROWS, stop, _ROWS):
        high = min(low + _ROWS, partition.total)
        mine = slice(max(start - low, 0), min(stop, high) - low)
        try:
            data = kept.read_bytes(str(low // _ROWS))
        except _UNUSABLE:
            return None
        checksum, content = data[:64], data[64:]
        if sha256(content).encode() != checksum or len(content) != 8 * (high - low) * k:
            return None
        half = len(content) // 2
        values.append(np.frombuffer(content[:half], np.float32).reshape(-1, k)[mine])
        items.append(np.frombuffer(content[half:], np.int32).reshape(-1, k)[mine])
    return Neighbours(
        torch.from_numpy(np.concatenate(values)), torch.from_numpy(np.concatenate(items).astype(np.int64))
    )


def _write(kept: Folder, world: World, partition: Partition, values: torch.Tensor, items: torch.Tensor) -> None:
    """Write all ranks' lists; the ranks take turns at writing. A file that cannot be written is left out."""
    for low in range(0, partition.total, _ROWS):
        high, number = min(low + _ROWS, partition.total), low // _ROWS
        whole = [world.chunk(rows, partition, low, high) for rows in (values, items.int())]
        if number % world.size == world.rank:
            content = b"".join(rows.numpy().tobytes() for rows in whole)
            with suppress(*_UNUSABLE):
                kept.write_bytes(sha256(content).encode() + content, str(number))
