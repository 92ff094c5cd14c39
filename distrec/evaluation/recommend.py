"""Recommendations for a few users next to their histories: examples to look at, not a measurement.

The items are computed with the evaluator's chunks and mask, so they come from the same ranking as its metrics and are
the same at any number of workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from distrec.data.dataset import Dataset, Interactions
from distrec.data.histories import PADDING, Histories
from distrec.evaluation.chunks import Score, my_part
from distrec.evaluation.ranking import Evaluator
from distrec.parallel.topk import merge_top, top_columns

USERS, HISTORY, RECOMMENDED = 6, 12, 10


def spread_users(evaluated: np.ndarray, train: Interactions, count: int = USERS) -> np.ndarray:
    """Choose `count` of the users `evaluated` (ascending), in equal steps from the least to the most active.

    Activity is the number of training interactions. Equally active users are ordered by number. If there are fewer than
    `count` users, all are chosen. The choice depends only on the data, so every run on the same data shows the same
    users.

    Returns:
        Indices into `evaluated`, the least active user first.
    """
    activity = np.bincount(train.user, minlength=int(evaluated.max(initial=-1)) + 1)[evaluated]
    order = np.argsort(activity, kind="stable")
    at = np.linspace(0, len(order) - 1, min(count, len(order)))
    return order[at.round().astype(np.int64)]


@torch.no_grad()
def recommend(
    evaluator: Evaluator, chosen: np.ndarray, user_block: torch.Tensor, item_block: torch.Tensor, score: Score, k: int
) -> list[list[int]]:
    """The `k` best unmasked items of a few users, best first, equal scores in item order. Collective.

    A user with fewer than `k` unmasked items gets all of them.

    Args:
        evaluator: the evaluator whose chunks and mask are used.
        chosen: the users' indices into `evaluator.pairs.user`.
        user_block, item_block, score: as for `Evaluator.rank`.
        k: the number of items per user.
    """
    ascending = np.sort(chosen)
    part = my_part(evaluator.world, evaluator.users, evaluator.pairs, ascending)
    users = part.exchange.fetch_values(user_block)
    rows = [chunk.layers[0] for chunk in part.chunks]  # every user has a held-out item; later rows are padding
    best = [(torch.empty(count, 0), torch.empty(count, 0, dtype=torch.int64)) for count in rows]
    for low, high, items in evaluator.item_chunks(item_block):
        for number, chunk in enumerate(part.chunks):
            scores = score(users.index_select(0, chunk.place), items).contiguous()
            inside = (chunk.mask_item >= low) & (chunk.mask_item < high)
            scores[chunk.mask_row[inside], chunk.mask_item[inside] - low] = -torch.inf
            values, columns = top_columns(scores[: rows[number]], k)
            best[number] = merge_top(*best[number], values, columns + low, k)

    # Each user was scored by one rank; the sum over ranks gives every rank the result. 0 means no item.
    found = torch.zeros(len(chosen), k, dtype=torch.int64)
    for chunk, (values, items) in zip(part.chunks, best):
        at = torch.from_numpy(np.searchsorted(ascending, chunk.at[: len(values)]))
        found[at, : items.shape[1]] = torch.where(values > -torch.inf, items + 1, 0)
    whole = evaluator.world.sum_(found)[torch.from_numpy(np.searchsorted(ascending, chosen))]
    return [row[row > 0].sub(1).tolist() for row in whole]


def examples(
    evaluator: Evaluator,
    chosen: np.ndarray,
    histories: Histories,
    data: Dataset,
    recommended: list[list[int]],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The users `evaluator.pairs.user[chosen]` as a JSON value, with original ids and titles.

    Args:
        evaluator: the evaluator of the split.
        chosen: the users' indices into `evaluator.pairs.user`.
        histories: the users' interactions before the split.
        data: the dataset, which knows ids and titles.
        recommended: the recommended items of the chosen users, as `recommend` returns them.
        about: what was ranked, as `report.about` returns it.

    Returns:
        `about` and `users`: `user` (index), `id` (original), `history`, `held_out` and `recommended`. Each item has
        `item` (index), `id` (original) and `title` (null if it has none).
    """
    pairs = evaluator.pairs
    had = histories.newest(pairs.user[chosen], HISTORY)
    ids = data.users_table()["original"].take(pairs.user[chosen]).to_pylist()
    known = data.items_table()

    def named(items: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        rows = known.take(np.asarray(items, np.int64)).select(["original", "title"]).to_pylist()
        return [
            {"item": int(item), "id": row["original"], "title": row["title"] or None} for item, row in zip(items, rows)
        ]

    return {
        "about": dict(about),
        "users": [
            {
                "user": int(pairs.user[at]),
                "id": name,
                "history": named(row[row != PADDING]),
                "held_out": named(pairs.item[pairs.offsets[at] : pairs.offsets[at + 1]]),
                "recommended": named(items),
            }
            for at, name, row, items in zip(chosen, ids, had, recommended, strict=True)
        ],
    }
