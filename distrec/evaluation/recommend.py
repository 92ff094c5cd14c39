"""What a few users would be shown, beside what they have had: examples to look at, not a measure.

The items come out of the evaluator's own chunks and mask, so they are the ranking that its metrics speak of, and the same
at any number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from distrec.data.dataset import Interactions
from distrec.data.histories import PADDING, Histories
from distrec.evaluation.chunks import Score, plan
from distrec.evaluation.ranking import Evaluator
from distrec.parallel.topk import merge_top, top_columns

USERS, HISTORY, RECOMMENDED = 6, 12, 10


def spread_users(evaluated: np.ndarray, train: Interactions, count: int = USERS) -> np.ndarray:
    """`count` of the users `evaluated` (ascending), from the least to the most active in equal steps; all, if fewer.

    Activity is the number of training interactions; of equally active users the lower number comes first. The choice
    depends on the data alone, so every run on them shows the same users.

    Returns:
        Places in `evaluated`, the least active user first.
    """
    activity = np.bincount(train.user, minlength=int(evaluated.max(initial=-1)) + 1)[evaluated]
    order = np.argsort(activity, kind="stable")
    at = np.linspace(0, len(order) - 1, min(count, len(order)))
    return order[at.round().astype(np.int64)]


@torch.no_grad()
def recommend(
    evaluator: Evaluator, chosen: np.ndarray, user_block: torch.Tensor, item_block: torch.Tensor, score: Score, k: int
) -> list[list[int]]:
    """The `k` best unmasked items of a few users, best first, equal scores in item order; fewer where fewer are left. Collective.

    Args:
        chosen: their places in `evaluator.pairs.user`.
        user_block, item_block, score: as `Evaluator.rank` takes them.
    """
    ascending = np.sort(chosen)
    planned = plan(evaluator.world, evaluator.users, evaluator.pairs, ascending)
    users = planned.exchange.fetch_values(user_block)
    rows = [chunk.layers[0] for chunk in planned.chunks]  # every user has a held-out item; behind them copies fill up
    best = [(torch.empty(count, 0), torch.empty(count, 0, dtype=torch.int64)) for count in rows]
    for low, high, items in evaluator.item_chunks(item_block):
        for number, chunk in enumerate(planned.chunks):
            scores = score(users.index_select(0, chunk.place), items).contiguous()
            inside = (chunk.mask_item >= low) & (chunk.mask_item < high)
            scores[chunk.mask_row[inside], chunk.mask_item[inside] - low] = -torch.inf
            values, columns = top_columns(scores[: rows[number]], k)
            best[number] = merge_top(*best[number], values, columns + low, k)

    # One rank has scored each user; the sum over ranks tells all of them. 0 stands for no item.
    found = torch.zeros(len(chosen), k, dtype=torch.int64)
    for chunk, (values, items) in zip(planned.chunks, best):
        at = torch.from_numpy(np.searchsorted(ascending, chunk.at[: len(values)]))
        found[at, : items.shape[1]] = torch.where(values > -torch.inf, items + 1, 0)
    whole = evaluator.world.sum_(found)[torch.from_numpy(np.searchsorted(ascending, chosen))]
    return [row[row > 0].sub(1).tolist() for row in whole]


def examples(
    evaluator: Evaluator, chosen: np.ndarray, histories: Histories, ids: Sequence[str], recommended: list[list[int]]
) -> dict[str, Any]:
    """The users `evaluator.pairs.user[chosen]` as a JSON value.

    Args:
        chosen: their places in `evaluator.pairs.user`.
        histories: what users have had before the split.
        ids: their original ids.
        recommended: what `recommend` gave for them.
    """
    pairs = evaluator.pairs
    had = histories.newest(pairs.user[chosen], HISTORY)
    return {
        "users": [
            {
                "user": int(pairs.user[at]),
                "id": name,
                "history": row[row != PADDING].tolist(),
                "held_out": pairs.item[pairs.offsets[at] : pairs.offsets[at + 1]].tolist(),
                "recommended": items,
            }
            for at, name, row, items in zip(chosen, ids, had, recommended, strict=True)
        ]
    }
