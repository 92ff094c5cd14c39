"""Ranking metrics from the ranks of held-out items (docs/methods/alignrec.md section 5.3), in float64.

A user has L held-out items; h_k = 1 if the item at position k (from 1) of the user's ranking is one of them, else 0.

* Recall@K = sum_{k<=K} h_k / L
* NDCG@K = (sum_{k<=K} h_k / log2(k+1)) / (sum_{k<=min(K,L)} 1 / log2(k+1))
* Precision@K = sum_{k<=K} h_k / K
* MAP@K = (sum_{k<=K} h_k Precision@k) / min(K, L)
* Hit@K = 1 if any h_k with k <= K is 1, else 0

Each metric is a mean over the users that have at least one held-out item.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Z95 = 1.959963984540054  # 97.5 % point of the standard normal distribution


def per_user(rank: np.ndarray, offsets: np.ndarray, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Every metric of every user.

    Args:
        rank: the position (from 0) of each held-out item in its user's ranking `[pairs]`. Positions from `max(ks)` on
            may be any number from there on. A user's positions below `max(ks)` are distinct.
        offsets: user n's pairs are `offsets[n]:offsets[n + 1]`, at least one; `[users + 1]`.
        ks: the cut-offs.

    Returns:
        `recall@K`, `ndcg@K`, `precision@K`, `map@K`, `hit@K` for each K: float64 `[users]`.
    """
    users, longest = len(offsets) - 1, max(ks)
    length = np.diff(offsets)
    owner = np.repeat(np.arange(users), length)
    found = rank < longest
    order = np.lexsort((rank[found], owner[found]))
    rank, owner = rank[found][order].astype(np.int64), owner[found][order]
    hits_before = np.arange(len(owner)) - np.searchsorted(owner, owner)
    gain = 1.0 / np.log2(np.arange(2, longest + 2))
    ideal = np.concatenate([[0.0], np.cumsum(gain)])
    out: dict[str, np.ndarray] = {}
    for k in ks:
        top = rank < k
        owners = owner[top]
        hits = np.bincount(owners, minlength=users).astype(np.float64)
        reach = np.minimum(length, k)
        out[f"recall@{k}"] = hits / length
        out[f"ndcg@{k}"] = np.bincount(owners, gain[rank[top]], users) / ideal[reach]
        out[f"precision@{k}"] = hits / k
        out[f"map@{k}"] = np.bincount(owners, (hits_before[top] + 1.0) / (rank[top] + 1.0), users) / reach
        out[f"hit@{k}"] = np.minimum(hits, 1.0)
    return out


def means(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mean of each metric over users; empty if there are no users."""
    return {name: float(value.mean()) for name, value in values.items() if len(value)}


def intervals(values: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """95 % confidence interval of each mean over users: normal approximation, mean ± 1.96 s / sqrt(users).

    It shows how far the mean would move with other users of the same kind, not with another training seed. With a
    single user the interval is ± 1, because one user says nothing about the spread.
    """
    out = {}
    for name, value in values.items():
        if len(value):
            half = Z95 * value.std(ddof=1) / np.sqrt(len(value)) if len(value) > 1 else 1.0
            out[name] = (float(value.mean() - half), float(value.mean() + half))
    return out
