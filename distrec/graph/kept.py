"""Neighbour lists kept between runs by what they were computed from: `<run.graphs>/<key>/<number>`.

Many runs on one dataset, the trials of a search above all, want the same lists; products of all pairs of items are most of
what such a run does before its first step. A file holds the lists of 8,192 items, whatever the number of workers, and the
SHA-256 of its content: a worker reads those that hold its items, and one that is damaged or not there makes all workers
compute the lists anew. Files are written whole, with the same bytes by every run, so runs may share a folder at any time.
Deleting it costs time only.
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
from distrec.graph.knn import cosine_neighbours
from distrec.parallel.partition import Partition
from distrec.parallel.world import World

_FORMAT = 1  # another one wherever the same key would come to hold other bytes
_ROWS = 8192
_UNUSABLE = (OSError, BotoCoreError)

NOTE = {"content": "nearest neighbours of items, kept by distrec for runs that name this folder; safe to delete"}

Lists = tuple[torch.Tensor, torch.Tensor]


def kept_neighbours(
    folder: Folder,
    world: World,
    partition: Partition,
    made_of: Mapping[str, Any],
    block: torch.Tensor,
    k: int,
    include_self: bool = True,
) -> Lists:
    """`cosine_neighbours(world, partition, block, k, include_self)` to the bit, read from `folder` where it holds them. Collective.

    Args:
        made_of: what decides all items' vectors, as a JSON value; together with the other settings it is the key. It does
            not name the number of workers: a product does not depend on it, and a mean that fills missing rows does so in
            its last float64 bits only.
    """
    k = min(k, partition.rows if include_self else partition.rows - 1)
    # Another build or processor rounds otherwise: workers that differ in them never find whole lists, and compute.
    build = [torch.__version__, torch.backends.cpu.get_cpu_capability()]
    kept = folder.folder(digest([_FORMAT, dict(made_of), partition.rows, k, include_self, build]))
    found = _read(kept, partition, world.rank, k)
    someone_lacks = int(world.max_(torch.tensor(int(found is None))))
    if found is not None and not someone_lacks:
        return found
    computed = cosine_neighbours(world, partition, block, k, include_self)
    _write(kept, world, partition, *computed)
    return computed


def _read(kept: Folder, partition: Partition, rank: int, k: int) -> Lists | None:
    """My items' lists; None where a file is missing or is not what was written."""
    start, stop = partition.start(rank), partition.stop(rank)
    values, items = [np.empty((0, k), np.float32)], [np.empty((0, k), np.int32)]
    for low in range(start - start % _ROWS, stop, _ROWS):
        high = min(low + _ROWS, partition.rows)
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
    return torch.from_numpy(np.concatenate(values)), torch.from_numpy(np.concatenate(items).astype(np.int64))


def _write(kept: Folder, world: World, partition: Partition, values: torch.Tensor, items: torch.Tensor) -> None:
    """Keep everyone's lists; the workers take turns at writing. A file that cannot be written is one to compute again."""
    for low in range(0, partition.rows, _ROWS):
        high, number = min(low + _ROWS, partition.rows), low // _ROWS
        whole = [world.chunk(rows, partition, low, high) for rows in (values, items.int())]
        if number % world.size == world.rank:
            content = b"".join(rows.numpy().tobytes() for rows in whole)
            with suppress(*_UNUSABLE):
                kept.write_bytes(sha256(content).encode() + content, str(number))
