"""Which users are scored together, and on which rank.

The global list of users is cut into chunks of a fixed size, and whole chunks are distributed over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from distrec.data.dataset import Interactions
from distrec.data.ordered import contains, distinct, starts
from distrec.parallel.exchange import Exchange, batch_exchange
from distrec.parallel.partition import Partition, share
from distrec.parallel.world import World

USERS_PER_CHUNK = 256
ROWS_AT_ONCE = 64

T = TypeVar("T")

Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Pairs:
    """Held-out and masked pairs of a user and an item, sorted by user and item, without repeats.

    Attributes:
        items: number of items.
        user: users with at least one held-out item, ascending, int64 `[users]`.
        offsets: the held-out pairs of `user[n]` are `offsets[n]:offsets[n + 1]`; int64 `[users + 1]`.
        item: the item of each held-out pair, int64 `[pairs]`.
        mask: the key user x items + item of each masked pair of any user, ascending, int64 `[masked pairs]`.
        masked: whether each held-out pair is masked too, bool `[pairs]`.
    """

    items: int
    user: np.ndarray
    offsets: np.ndarray
    item: np.ndarray
    mask: np.ndarray
    masked: np.ndarray

    @classmethod
    def of(cls, held_out: Interactions, masked: Sequence[Interactions], items: int) -> Pairs:
        """The distinct pairs in `held_out` and in `masked`."""
        none = np.empty(0, np.int64)
        pairs = distinct(_keys(held_out, items))
        mask = distinct(np.concatenate([none, *(_keys(rows, items) for rows in masked)]))
        owner = pairs // items
        first = starts(owner)
        return cls(items, owner[first], np.append(first, len(pairs)), pairs % items, mask, contains(mask, pairs))

    @property
    def length(self) -> np.ndarray:
        """The number of held-out items of each user `[users]`."""
        return np.diff(self.offsets)

    def of_users(self, chosen: np.ndarray) -> np.ndarray:
        """The indices of the held-out pairs of `user[chosen]`."""
        return _ranges(self.offsets[chosen], self.offsets[chosen + 1])[1]


@dataclass(frozen=True)
class Chunk:
    """Users that are scored together, as rows in descending order of their number of held-out items.

    In this order, the users that have an l-th held-out item are the first `layers[l]` rows. Pairs are listed layer by
    layer, and by row within a layer.
    """

    at: np.ndarray  # index of each row's user in `Pairs.user`; the last row is repeated to fill up the chunk
    place: torch.Tensor  # index of each row among the fetched rows
    layers: list[int]
    pair: torch.Tensor  # index of each pair among all held-out pairs
    row: torch.Tensor  # the row of each pair
    item: torch.Tensor  # the item of each pair
    mask_row: torch.Tensor  # the row of each masked pair
    mask_item: torch.Tensor  # the item of each masked pair


@dataclass(frozen=True)
class Part:
    """What one rank scores: the exchange that fetches its users' rows, and its chunks."""

    exchange: Exchange
    chunks: list[Chunk]


def deal(count: int, size: int) -> list[tuple[int, int]]:
    """For each of `size` ranks, the range (start, stop) that it scores in a list of `count` users, in whole chunks."""
    chunks = -(-count // USERS_PER_CHUNK)
    ranges = (share(chunks, rank, size) for rank in range(size))
    return [(min(start * USERS_PER_CHUNK, count), min(stop * USERS_PER_CHUNK, count)) for start, stop in ranges]


def my_part(world: World, users: Partition, pairs: Pairs, chosen: np.ndarray) -> Part:
    """This rank's part of scoring `pairs.user[chosen]`, where `chosen` is ascending and the same on every rank."""
    dealt = deal(len(chosen), world.size)
    exchange, _ = batch_exchange(world, users, [torch.from_numpy(pairs.user[chosen[a:b]]) for a, b in dealt])
    first, stop = dealt[world.rank]
    starts = range(first, stop, USERS_PER_CHUNK)
    return Part(
        exchange, [_chunk(pairs, chosen[start : min(start + USERS_PER_CHUNK, stop)], start - first) for start in starts]
    )


def _chunk(pairs: Pairs, chosen: np.ndarray, place: int) -> Chunk:
    """The chunk of `pairs.user[chosen]`, whose rows start at index `place` among the fetched rows."""
    order = np.argsort(-pairs.length[chosen], kind="stable")
    rows = chosen[order]
    row, pair = _ranges(pairs.offsets[rows], pairs.offsets[rows + 1])
    layer = pair - pairs.offsets[rows][row]
    listed = np.lexsort((row, layer))
    row, pair = row[listed], pair[listed]
    low = pairs.user[rows] * pairs.items
    mask_row, masked = _ranges(np.searchsorted(pairs.mask, low), np.searchsorted(pairs.mask, low + pairs.items))
    filled = np.append(order, np.full(USERS_PER_CHUNK - len(order), order[-1]))
    return Chunk(
        at=chosen[filled],
        place=torch.from_numpy(place + filled),
        layers=np.bincount(layer).tolist(),
        pair=torch.from_numpy(pair),
        row=torch.from_numpy(row),
        item=torch.from_numpy(pairs.item[pair]),
        mask_row=torch.from_numpy(mask_row),
        mask_item=torch.from_numpy(pairs.mask[masked] % pairs.items),
    )


def each(task: Callable[..., T], *of_chunks: Sequence[Any]) -> list[T]:
    """Call `task` for every chunk, on as many chunks at a time as torch has threads, and return the results in order.

    Each chunk is computed by one thread. So no thread waits for another within an operation, and the result cannot
    depend on the number of threads.

    Args:
        task: called with one element of each of `of_chunks`.
        of_chunks: lists with one element for each chunk.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return [task(*args) for args in zip(*of_chunks)]

    def alone(*args: Any) -> T:
        with torch.no_grad():  # each thread has its own gradient mode
            return task(*args)

    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(alone, *of_chunks))
    finally:
        torch.set_num_threads(threads)


def count_above(chunk: Chunk, scores: torch.Tensor, limit: torch.Tensor, count: torch.Tensor) -> None:
    """Add to `count` `[pairs]`, for each pair, how many scores of its row are above its limit.

    Args:
        scores: `[rows, columns]`, float32.
        limit: `[pairs]`, in the order of the chunk's pairs.
        count: `[pairs]`, int32; changed in place.
    """
    # Comparing into floats and summing them is fast on CPUs, and exact up to 2**24 columns. A few rows at a time keep
    # the results of the comparison in the cache until they are summed.
    work = torch.empty(ROWS_AT_ONCE, scores.shape[1])
    start = 0
    for rows in chunk.layers:
        for low in range(0, rows, ROWS_AT_ONCE):
            high = min(low + ROWS_AT_ONCE, rows)
            above = torch.gt(scores[low:high], limit[start + low : start + high].unsqueeze(1), out=work[: high - low])
            count[start + low : start + high] += above.sum(1).int()
        start += rows


def _ranges(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The index of each number's range, and the numbers of all ranges `start[n]:stop[n]`, one after another."""
    count = stop - start
    which = np.repeat(np.arange(len(start)), count)
    return which, np.arange(len(which)) + (start - np.cumsum(count) + count)[which]


def _keys(pairs: Interactions, items: int) -> np.ndarray:
    return pairs.user.astype(np.int64) * items + pairs.item
