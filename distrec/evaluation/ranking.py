"""Exact full ranking over all items: the rank of every held-out item, without sorting anything.

The rank of a held-out item is the number of unmasked items that come before it: those with a higher score, and those with
the same score and a lower number. Counting them takes one comparison per score, where a top-K takes a selection, and what
is kept is one integer per held-out pair, from which every metric and every slice follows.

Same bits at any number of workers: the list of evaluated users is cut into chunks of a fixed size (the last one padded),
the items likewise, and whole chunks are dealt to ranks. So a score is an element of a product of the same shape, at the
same place in it, whoever computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from distrec.data.dataset import Interactions
from distrec.errors import InputError
from distrec.evaluation import metrics
from distrec.parallel.exchange import batch_exchange
from distrec.parallel.partition import Partition, share
from distrec.parallel.world import World

USERS_PER_CHUNK = 128
ITEMS_PER_CHUNK = 8192  # a chunk of scores takes 4 MiB and their comparison as much: both stay in cache

_NONE = np.iinfo(np.int64).max

Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Ranked:
    """Where each held-out item stands in its user's ranking. The same on every rank.

    Attributes:
        ks: cut-offs, ascending.
        user: users with at least one held-out item, ascending `[users]`.
        offsets: the pairs of `user[n]` are `offsets[n]:offsets[n + 1]` `[users + 1]`.
        item: held-out item of each pair `[pairs]`.
        rank: its position from 0, or `ks[-1]` where that is not among the first `ks[-1]` `[pairs]`.
        masked: pairs whose item is masked for its user, and so can not be found `[pairs]`.
    """

    ks: tuple[int, ...]
    user: np.ndarray
    offsets: np.ndarray
    item: np.ndarray
    rank: np.ndarray
    masked: np.ndarray

    @cached_property
    def _per_user(self) -> dict[str, np.ndarray]:
        return metrics.per_user(self.rank, self.offsets, self.ks)

    def metrics(self) -> dict[str, float]:
        """`recall@K`, `ndcg@K`, `precision@K`, `map@K`, `hit@K` for each K: means over users; empty without users."""
        return metrics.means(self._per_user)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95 % confidence interval of each of `metrics()` over users."""
        return metrics.intervals(self._per_user)

    def keep(self, pairs: np.ndarray) -> Ranked:
        """Only some held-out pairs (bool `[pairs]`) and the users that have any of them.

        Ranks stay as they are: they are still places among all items, and a held-out item that is left out is neither a
        hit nor counted in L.
        """
        counts = np.add.reduceat(pairs, self.offsets[:-1], dtype=np.int64) if len(self.user) else np.empty(0, np.int64)
        users = counts > 0
        offsets = np.concatenate([[0], np.cumsum(counts[users])])
        return Ranked(self.ks, self.user[users], offsets, self.item[pairs], self.rank[pairs], self.masked[pairs])

    def user_of_pair(self) -> np.ndarray:
        """User of each pair `[pairs]`."""
        return np.repeat(self.user, np.diff(self.offsets))


@dataclass(frozen=True)
class _Chunk:
    """Users scored together, in rows of descending number of held-out items.

    So the users that have an l-th held-out item are the first `layers[l]` rows. Pairs are listed layer by layer, and by
    row within each.
    """

    user: np.ndarray  # user of each row; the last chunk is filled up with its last row
    place: torch.Tensor  # where each row lies among the fetched rows
    layers: list[int]
    pair: torch.Tensor  # number of each pair among all held-out pairs
    row: torch.Tensor  # and its row
    item: torch.Tensor  # and its item
    mask_row: torch.Tensor
    mask_item: torch.Tensor


class Evaluator:
    """Full ranking of one split under one mask; built once, used at every evaluation.

    Args:
        users, items: how the rows of the two sides lie on ranks.
        held_out: the pairs to find; a repeated pair counts once. Every rank passes the same arrays, here and below.
        masked: pairs whose items are left out of their user's ranking.
        ks: cut-offs, ascending.

    Raises:
        InputError: nothing is held out.
    """

    def __init__(
        self,
        world: World,
        users: Partition,
        items: Partition,
        held_out: Interactions,
        masked: Sequence[Interactions],
        ks: Sequence[int],
    ):
        if not len(held_out):
            raise InputError(
                "the split to evaluate has no interactions; choose another split or prepare the data anew."
            )
        self.world, self.items, self.ks = world, items, tuple(ks)
        pairs = _keys(held_out, items.rows)
        mask = np.unique(np.concatenate([np.empty(0, np.int64), *(_keys(rows, items.rows) for rows in masked)]))
        self.user, offsets = np.unique(pairs // items.rows, return_index=True)
        self.offsets = np.append(offsets, len(pairs))
        self.item = pairs % items.rows
        self.masked = np.isin(pairs, mask, assume_unique=True)

        chunks = -(-len(self.user) // USERS_PER_CHUNK)
        dealt = [share(chunks, rank, world.size) for rank in range(world.size)]
        mine = [torch.from_numpy(self.user[a * USERS_PER_CHUNK : b * USERS_PER_CHUNK]) for a, b in dealt]
        self._exchange, _ = batch_exchange(world, users, mine)
        first, stop = dealt[world.rank]
        self._chunks = [self._chunk(chunk, first, mask) for chunk in range(first, stop)]

    def _chunk(self, number: int, first: int, mask: np.ndarray) -> _Chunk:
        """Chunk `number`, where `first` is the first of this rank and `mask` the sorted keys of all masked pairs."""
        start, stop = number * USERS_PER_CHUNK, min((number + 1) * USERS_PER_CHUNK, len(self.user))
        offsets = self.offsets[start : stop + 1]
        order = np.argsort(-np.diff(offsets), kind="stable")
        row_of = np.argsort(order)
        user = np.repeat(np.arange(stop - start), np.diff(offsets))
        layer = np.arange(offsets[0], offsets[-1]) - offsets[user]
        listed = np.lexsort((row_of[user], layer))
        pair = offsets[0] + listed

        low, high = self.user[start], self.user[stop - 1] + 1
        keys = mask[np.searchsorted(mask, low * self.items.rows) : np.searchsorted(mask, high * self.items.rows)]
        at = np.searchsorted(self.user[start:stop], keys // self.items.rows)
        known = self.user[start:stop][at] == keys // self.items.rows  # masked pairs of users who are evaluated
        filled = np.append(order, np.full(USERS_PER_CHUNK - len(order), order[-1]))
        return _Chunk(
            user=self.user[start:stop][filled],
            place=torch.from_numpy(filled + (number - first) * USERS_PER_CHUNK),
            layers=np.bincount(layer).tolist(),
            pair=torch.from_numpy(pair),
            row=torch.from_numpy(row_of[user[listed]]),
            item=torch.from_numpy(self.item[pair]),
            mask_row=torch.from_numpy(row_of[at[known]]),
            mask_item=torch.from_numpy(keys[known] % self.items.rows),
        )

    @torch.no_grad()
    def rank(self, user_block: torch.Tensor, item_block: torch.Tensor, score: Score) -> Ranked:
        """The rank of every held-out item. Collective.

        Args:
            user_block: my users' representations `[my users, …]`.
            item_block: my items' representations `[my items, …]`.
            score: scores `[C, J]`, float32 and newly made, of C users `[C, …]` and J items `[J, …]`.

        Raises:
            FloatingPointError: a score is NaN or infinite; on every rank.
        """
        users = self._exchange.fetch_values(user_block)
        # With several chunks of items a target's score must be known before the chunk that holds it: one pass to read
        # the targets' scores, one to count.
        whole = self.items.rows <= ITEMS_PER_CHUNK
        targets = [users.new_empty(len(chunk.pair), dtype=torch.float32) for chunk in self._chunks]
        if not whole:
            for low, high, items in self._item_chunks(item_block):
                for chunk, target in zip(self._chunks, targets):
                    inside = ((chunk.item >= low) & (chunk.item < high)).nonzero().squeeze(1)
                    if len(inside):
                        scores = score(users.index_select(0, chunk.place), items)
                        target[inside] = scores[chunk.row[inside], chunk.item[inside] - low]

        counts = [torch.zeros(len(chunk.pair), dtype=torch.int32, device=users.device) for chunk in self._chunks]
        not_finite = _NONE
        for low, high, items in self._item_chunks(item_block):
            work = items.new_empty(USERS_PER_CHUNK, high - low, dtype=torch.float32)
            for chunk, target, count in zip(self._chunks, targets, counts):
                scores = score(users.index_select(0, chunk.place), items).contiguous()
                not_finite = min(not_finite, self._first_not_finite(chunk, low, scores))
                if whole:
                    target = scores[chunk.row, chunk.item]
                self._count(chunk, low, scores, target, count, work)
                del scores  # before the next ones are made, so that these are written to the same, warm memory

        first = -int(self.world.max_(torch.tensor(-not_finite, device=users.device)))
        if first != _NONE:
            user, item = divmod(first, self.items.rows)
            raise FloatingPointError(f"the score of user {user} and item {item} is NaN or infinite")

        rank = torch.zeros(len(self.item), dtype=torch.int32, device=users.device)
        for chunk, count in zip(self._chunks, counts):
            rank[chunk.pair] = count.clamp(max=self.ks[-1])
        found = self.world.sum_(rank).numpy(force=True)
        found[self.masked] = self.ks[-1]
        return Ranked(self.ks, self.user, self.offsets, self.item, found, self.masked)

    def _item_chunks(self, block: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Start, end and representations of each chunk of items. Copied, since a product may depend on alignment."""
        for low in range(0, self.items.rows, ITEMS_PER_CHUNK):
            high = min(low + ITEMS_PER_CHUNK, self.items.rows)
            yield low, high, self.world.chunk(block, self.items, low, high).clone()

    def _first_not_finite(self, chunk: _Chunk, low: int, scores: torch.Tensor) -> int:
        """The lowest user x items + item, of items from number `low` on, whose score is not finite."""
        if scores.sum().isfinite():  # a sum may overflow where no score does, so only this answer is final
            return _NONE
        row, column = (~scores.isfinite()).nonzero().numpy(force=True).T
        return int((chunk.user[row] * self.items.rows + low + column).min(initial=_NONE))

    def _count(
        self,
        chunk: _Chunk,
        low: int,
        scores: torch.Tensor,
        target: torch.Tensor,
        count: torch.Tensor,
        work: torch.Tensor,
    ) -> None:
        """Add to `count` `[pairs]` the items of one chunk, from number `low` on, that come before each pair's item.

        `scores` is overwritten at masked items, `work`, of its shape, everywhere.
        """
        columns = scores.shape[1]
        masked = chunk.mask_item - low
        inside = (masked >= 0) & (masked < columns)
        scores.view(-1)[(chunk.mask_row * columns + masked)[inside]] = -torch.inf

        # Items numbered below the target come before it on equal scores too: x >= t is x > (the number before t).
        below = chunk.item >= low + columns
        limit = torch.where(below, target.nextafter(target.new_tensor(-torch.inf)), target).unsqueeze(1)
        start = 0
        for rows in chunk.layers:
            # Comparing into floats and summing them is the fast path of the CPU kernels; exact up to 2**24 items.
            above = torch.gt(scores[:rows], limit[start : start + rows], out=work[:rows])
            count[start : start + rows] += above.sum(1).int()
            start += rows

        # Where the target lies in this chunk, some of the items equal to it come before and some after.
        open_ = (chunk.item >= low) & ~below & (count < self.ks[-1])
        for some in open_.nonzero().squeeze(1).split(USERS_PER_CHUNK):
            equal = torch.eq(scores[chunk.row[some]], target[some].unsqueeze(1), out=work[: len(some)])
            tied = (equal.sum(1) > 1).nonzero().squeeze(1)
            if len(tied):
                number = torch.arange(columns, device=scores.device)
                before = number < (chunk.item[some[tied]] - low).unsqueeze(1)
                count[some[tied]] += (equal[tied] * before).sum(1).int()


def _keys(pairs: Interactions, items: int) -> np.ndarray:
    """The distinct pairs as sorted numbers user x items + item."""
    return np.unique(pairs.user.astype(np.int64) * items + pairs.item)
