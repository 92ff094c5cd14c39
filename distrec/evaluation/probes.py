"""Decides most ranks early: a held-out item with K popular items clearly above it is beyond every cut-off."""

from __future__ import annotations

import numpy as np
import torch

from distrec.evaluation.chunks import Chunk, Pairs, Score, count_above, deal, each, my_part
from distrec.parallel.exchange import batch_exchange
from distrec.parallel.partition import Partition
from distrec.parallel.world import World

PROBES = 512
SHORT = 4  # users with more held-out items are not probed, because one of these items is likely to rank high
CLEAR = 1e-4  # a probe must be above by this share of the user's largest score; rounding errors are far smaller


class Probes:
    """The most popular items, against which every user is scored before any is ranked among all items.

    Scores of one pair from matrix products of different shapes may differ in their last bits. So a probe counts only if
    it is above by a margin, and undecided users are ranked with newly computed scores.

    Args:
        users, items: the partitions of users and items over the ranks.
        pairs: the held-out and masked pairs.
        popular: the number of interactions of each item `[items]`; affects the speed, never the result.
        k: the longest cut-off.
    """

    def __init__(self, world: World, users: Partition, items: Partition, pairs: Pairs, popular: np.ndarray, k: int):
        self.world, self.pairs, self.k = world, pairs, k
        probes = np.argsort(-popular, kind="stable")[:PROBES]
        short = np.flatnonzero(pairs.length <= SHORT)
        self._part = my_part(world, users, pairs, short)
        # The held-out items are fetched together with the probes, so that one product gives the scores of both.
        needed = [
            torch.from_numpy(np.append(probes, pairs.item[pairs.of_users(short[a:b])]))
            for a, b in deal(len(short), world.size)
        ]
        needed[world.rank] = torch.cat([torch.from_numpy(probes), *(chunk.item for chunk in self._part.chunks)])
        self._exchange, places = batch_exchange(world, items, needed)
        self._probe_places, self._targets = places[:PROBES], places[PROBES:]
        column = np.full(items.total, -1)
        column[probes] = np.arange(PROBES)
        known = [torch.from_numpy(column[chunk.mask_item]) for chunk in self._part.chunks]
        self._mask = [
            (chunk.mask_row[columns >= 0], columns[columns >= 0]) for chunk, columns in zip(self._part.chunks, known)
        ]

    def undecided(self, user_block: torch.Tensor, item_block: torch.Tensor, score: Score) -> np.ndarray:
        """The indices in `pairs.user` of the users that must be ranked among all items, ascending. Collective.

        The first user is always one of them, so that every item is scored at least once.
        """
        users, items = self._part.exchange.fetch_values(user_block), self._exchange.fetch_values(item_block)
        probes = items.index_select(0, self._probe_places)
        targets = self._targets.split([len(chunk.pair) for chunk in self._part.chunks])
        masked = torch.from_numpy(self.pairs.masked)
        open_ = torch.from_numpy((self.pairs.length > SHORT).astype(np.int32))
        open_[0] = 1

        def left_open(chunk: Chunk, places: torch.Tensor, mask: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            chosen = torch.cat([probes, items.index_select(0, places)])
            scores = score(users.index_select(0, chunk.place), chosen).contiguous()
            margin = CLEAR * scores.abs().amax(1)
            limit = scores[chunk.row, PROBES + torch.arange(len(places))] + margin[chunk.row]
            scores[mask] = -torch.inf
            count = torch.zeros(len(places), dtype=torch.int32)
            count_above(chunk, scores[:, :PROBES], limit, count)
            return chunk.row[(count < self.k) & ~masked[chunk.pair]]

        for chunk, rows in zip(self._part.chunks, each(left_open, self._part.chunks, targets, self._mask)):
            open_[chunk.at[rows]] = 1
        return np.flatnonzero(self.world.sum_(open_).numpy())
