"""Functions that methods reading histories share: targets of next-item prediction, and user vectors for ranking."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from distrec.data.histories import PADDING, Histories
from distrec.methods.base import Space
from distrec.methods.batch import WindowBatch
from distrec.parallel.exchange import batch_exchange
from distrec.parallel.partition import share

_USERS_AT_ONCE = 512


def next_items(batch: WindowBatch) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """The targets of the batch's windows `[B, L + 1]`: each position that holds an item predicts the next item.

    Returns:
        Which of my rows' first L positions predict, bool `[my rows, L]`; the items that the positions of all ranks
        predict, in rank order `[predictions]`; the number of predictions of each rank.
    """
    known, size = batch.windows[:, :-1] != PADDING, batch.world.size
    counts = known.sum(1)
    shares = [slice(*share(batch.rows, rank, size)) for rank in range(size)]
    return known[shares[batch.world.rank]], batch.windows[:, 1:][known], [int(counts[part].sum()) for part in shares]


def user_vectors(
    space: Space,
    histories: Histories,
    length: int,
    items: torch.Tensor,
    encode: Callable[[torch.Tensor, torch.Tensor, np.ndarray], torch.Tensor],
) -> torch.Tensor:
    """My users' vectors `[my users, …]`, from the newest `length` items of their histories. Collective.

    Args:
        items: my items' input vectors `[my items, width]`.
        encode: computes the vectors `[n, …]` of n users from the input vectors of their histories `[n, length, width]`
            (arbitrary where there is no item), from which places hold an item, bool `[n, length]`, and from the users'
            numbers `[n]`.
    """
    world, partition, out = space.world, space.users, []
    for low in range(0, partition.block, _USERS_AT_ONCE):
        # Every rank reads all ranks' windows of this round, so that each knows which rows the others need from it.
        rounds = []
        for rank in range(world.size):
            start, stop = partition.start(rank), partition.stop(rank)
            rounds.append(np.arange(min(start + low, stop), min(start + low + _USERS_AT_ONCE, stop)))
        windows = [torch.from_numpy(histories.newest(users, length)) for users in rounds]
        real = [window != PADDING for window in windows]
        ids = [window[there] for window, there in zip(windows, real, strict=True)]
        exchange, place = batch_exchange(world, space.items, ids)
        found, there = exchange.fetch_values(items), real[world.rank]
        rows = items.new_zeros(*there.shape, *items.shape[1:])
        rows[there] = found.index_select(0, place)
        out.append(encode(rows, there, rounds[world.rank]))
    return torch.cat(out)
