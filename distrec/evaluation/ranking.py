"""Exact full ranking over all items: computes the rank of every held-out item without sorting.

The rank of a held-out item is the number of unmasked items that come before it: items with a higher score, and items
with the same score and a lower number. Counting them takes one comparison per score, while a top-K needs a selection.
The result is one integer per held-out pair, from which every metric and every slice follows.

Exact ranks beyond the longest cut-off K do not matter, and most ranks are beyond it: it is enough to know K better
items. So with many items, every user is first scored against a few popular items only (the probes). Users whose
held-out items all have K probes clearly above them are done. The other users are ranked among all items.

The result has the same bits at any number of workers. Users and items are cut into chunks of a fixed size (the last
chunk of users is padded), and whole chunks of users are distributed over the ranks. So a score is always computed at
the same place of a product of the same shape, on whichever rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from distrec.data.dataset import Interactions
from distrec.errors import InputError
from distrec.evaluation import metrics, probes
from distrec.evaluation.chunks import ROWS_AT_ONCE, Chunk, Pairs, Part, Score, count_above, each, my_part
from distrec.evaluation.probes import Probes
from distrec.parallel.partition import Partition
from distrec.parallel.world import World

ITEMS_PER_CHUNK = 8192  # a chunk of scores takes 8 MiB
_NONE = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Ranked:
    """The position of each held-out item in its user's ranking. The same on every rank.

    Attributes:
        ks: the cut-offs, ascending.
        user: the users with at least one held-out item, ascending `[users]`.
        offsets: the pairs of `user[n]` are `offsets[n]:offsets[n + 1]`; `[users + 1]`.
        item: the held-out item of each pair `[pairs]`.
        rank: the item's position (from 0), or `ks[-1]` if it is not among the first `ks[-1]`; `[pairs]`.
        masked: whether the item is masked for the user, so that it cannot be found; bool `[pairs]`.
    """

    ks: tuple[int, ...]
    user: np.ndarray
    offsets: np.ndarray
    item: np.ndarray
    rank: np.ndarray
    masked: np.ndarray

    @cached_property
    def per_user(self) -> dict[str, np.ndarray]:
        """Each metric for every user in `user`: float64 `[users]`."""
        return metrics.per_user(self.rank, self.offsets, self.ks)

    def metrics(self) -> dict[str, float]:
        """`recall@K`, `ndcg@K`, `precision@K`, `map@K`, `hit@K` for each K: means over users; empty without users."""
        return metrics.means(self.per_user)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95 % confidence interval of each of `metrics()` over users."""
        return metrics.intervals(self.per_user)

    def keep(self, pairs: np.ndarray) -> Ranked:
        """Only the chosen held-out pairs (bool `[pairs]`), and the users that have any of them.

        Ranks do not change: they remain positions among all items. A held-out item that is left out is neither a hit
        nor counted in L.
        """
        counts = np.add.reduceat(pairs, self.offsets[:-1], dtype=np.int64) if len(self.user) else np.empty(0, np.int64)
        users = counts > 0
        offsets = np.concatenate([[0], np.cumsum(counts[users])])
        return Ranked(self.ks, self.user[users], offsets, self.item[pairs], self.rank[pairs], self.masked[pairs])

    def user_of_pair(self) -> np.ndarray:
        """The user of each pair `[pairs]`."""
        return np.repeat(self.user, np.diff(self.offsets))


class Evaluator:
    """Full ranking of one split under one mask; built once, used at every evaluation.

    Args:
        users, items: the partitions of users and items over the ranks.
        held_out: the pairs to find; a repeated pair counts once. Every rank passes the same arrays.
        masked: pairs whose items are left out of their user's ranking. Every rank passes the same arrays.
        ks: the cut-offs, ascending.

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
                "the split to evaluate has no interactions; choose another split, or prepare the data again."
            )
        self.world, self.users, self.items, self.ks = world, users, items, tuple(ks)
        self.pairs = Pairs.of(held_out, masked, items.total)
        self._part = my_part(world, users, self.pairs, np.arange(len(self.pairs.user)))
        self._probes = None
        if items.total >= 4 * probes.PROBES and ks[-1] <= probes.PROBES:
            popular = np.bincount(
                np.concatenate([held_out.item, *(rows.item for rows in masked)]), minlength=items.total
            )
            self._probes = Probes(world, users, items, self.pairs, popular, ks[-1])

    @torch.no_grad()
    def rank(self, user_block: torch.Tensor, item_block: torch.Tensor, score: Score) -> Ranked:
        """The rank of every held-out item. Collective.

        Args:
            user_block: my users' representations `[my users, …]`.
            item_block: my items' representations `[my items, …]`.
            score: returns the scores `[C, J]`, float32 in a new array, of C users `[C, …]` and J items `[J, …]`.

        Raises:
            FloatingPointError: a score is NaN or infinite; raised on every rank. Every user and every item is scored at
                least once, but not every pair.
        """
        part = self._part
        if self._probes is not None:
            undecided = self._probes.undecided(user_block, item_block, score)
            part = my_part(self.world, self.users, self.pairs, undecided)
        counts, not_finite = self._counts(part, user_block, item_block, score)

        first = -int(self.world.max_(torch.tensor(-not_finite)))
        if first != _NONE:
            user, item = divmod(first, self.items.total)
            raise FloatingPointError(f"the score of user {user} and item {item} is NaN or infinite")

        # Each rank adds K minus its count, so that pairs that the probes decided, which no rank counts, get rank K.
        ahead = torch.zeros(len(self.pairs.item), dtype=torch.int32)
        for chunk, count in zip(part.chunks, counts):
            ahead[chunk.pair] = self.ks[-1] - count.clamp(max=self.ks[-1])
        rank = self.ks[-1] - self.world.sum_(ahead).numpy()
        rank[self.pairs.masked] = self.ks[-1]
        return Ranked(self.ks, self.pairs.user, self.pairs.offsets, self.pairs.item, rank, self.pairs.masked)

    def _counts(
        self, part: Part, user_block: torch.Tensor, item_block: torch.Tensor, score: Score
    ) -> tuple[list[torch.Tensor], int]:
        """For every chunk, the number of items before each pair's item; and the lowest key of a non-finite score."""
        users = part.exchange.fetch_values(user_block)
        # With several chunks of items, a target's score is needed before its own chunk is scored. So one pass reads the
        # targets' scores, and a second one counts.
        whole = self.items.total <= ITEMS_PER_CHUNK
        targets = [torch.empty(len(chunk.pair)) for chunk in part.chunks]
        for low, _, items in () if whole else self.item_chunks(item_block):

            def read(chunk: Chunk, target: torch.Tensor, low: int = low, items: torch.Tensor = items) -> None:
                inside = ((chunk.item >= low) & (chunk.item < low + len(items))).nonzero().squeeze(1)
                if len(inside):
                    scores = score(users.index_select(0, chunk.place), items)
                    target[inside] = scores[chunk.row[inside], chunk.item[inside] - low]

            each(read, part.chunks, targets)

        counts = [torch.zeros(len(chunk.pair), dtype=torch.int32) for chunk in part.chunks]
        not_finite = _NONE
        for low, _, items in self.item_chunks(item_block):

            def add(
                chunk: Chunk, target: torch.Tensor, count: torch.Tensor, low: int = low, items: torch.Tensor = items
            ) -> int:
                scores = score(users.index_select(0, chunk.place), items).contiguous()
                wrong = self._first_not_finite(chunk, low, scores)
                self._count(chunk, low, scores, scores[chunk.row, chunk.item] if whole else target, count)
                return wrong

            not_finite = min([not_finite, *each(add, part.chunks, targets, counts)])
        return counts, not_finite

    def item_chunks(self, block: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Start, end and representations of each chunk of items; copies, since a product may depend on alignment."""
        for low in range(0, self.items.total, ITEMS_PER_CHUNK):
            high = min(low + ITEMS_PER_CHUNK, self.items.total)
            yield low, high, self.world.chunk(block, self.items, low, high).clone()

    def _first_not_finite(self, chunk: Chunk, low: int, scores: torch.Tensor) -> int:
        """The lowest key user x items + item of a score that is not finite; the columns are the items from `low` on."""
        if scores.sum().isfinite():  # a sum that is not finite proves nothing, since it may overflow
            return _NONE
        row, column = (~scores.isfinite()).nonzero().numpy(force=True).T
        return int((self.pairs.user[chunk.at[row]] * self.items.total + low + column).min(initial=_NONE))

    def _count(
        self,
        chunk: Chunk,
        low: int,
        scores: torch.Tensor,
        target: torch.Tensor,
        count: torch.Tensor,
    ) -> None:
        """Add to `count` `[pairs]`, for each pair, how many of a chunk's items come before the pair's item.

        The chunk's items are numbered from `low` on. `scores` is overwritten at masked items.
        """
        columns = scores.shape[1]
        masked = chunk.mask_item - low
        inside = (masked >= 0) & (masked < columns)
        scores.view(-1)[(chunk.mask_row * columns + masked)[inside]] = -torch.inf

        # Items numbered below the target come before it on equal scores too: x >= t is x > (the number before t).
        below = chunk.item >= low + columns
        limit = torch.where(below, target.nextafter(target.new_tensor(-torch.inf)), target)
        count_above(chunk, scores, limit, count)

        # If the target is in this chunk, some of the items with an equal score come before it and some after it.
        open_ = (chunk.item >= low) & ~below & (count < self.ks[-1])
        for some in open_.nonzero().squeeze(1).split(ROWS_AT_ONCE):
            equal = torch.eq(scores[chunk.row[some]], target[some].unsqueeze(1))
            tied = (equal.sum(1) > 1).nonzero().squeeze(1)
            if len(tied):
                number = torch.arange(columns, device=scores.device)
                before = number < (chunk.item[some[tied]] - low).unsqueeze(1)
                count[some[tied]] += (equal[tied] * before).sum(1).int()
