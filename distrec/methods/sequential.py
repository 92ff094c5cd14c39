"""User vectors for ranking, for methods that read histories."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from distrec.data.histories import PADDING, Histories
from distrec.methods.workspace import Workspace
from distrec.parallel.exchange import batch_exchange

_USERS_AT_ONCE = 512


def user_vectors(
    space: Workspace,
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
