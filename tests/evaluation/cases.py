"""Random ranking problems and their solution in the simplest possible way."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from distrec.data.dataset import Interactions
from distrec.evaluation import Evaluator, Ranked
from distrec.parallel.partition import Partition
from distrec.parallel.world import World

KS = (1, 5, 10, 20)


@dataclass
class Case:
    """One ranking problem."""

    users: torch.Tensor
    items: torch.Tensor
    held_out: Interactions
    masked: list[Interactions]


def pairs(user: np.ndarray, item: np.ndarray) -> Interactions:
    return Interactions(user.astype(np.int32), item.astype(np.int32), np.zeros(len(user), np.int64))


def random_case(seed: int, users: int, items: int, held_out: int, masked: int, kind: str, dim: int = 4) -> Case:
    """A random case. Held-out pairs may repeat and may be masked, half the users have none, one has two unmasked items.

    Vectors are small integers ("ties": many equal scores), short fractions ("exact": products do not round) or normal
    numbers ("rounded"). In the last two kinds, each vector occurs twice.
    """
    draw = np.random.default_rng(seed)
    shapes = ((users, dim), (items, dim))
    if kind == "ties":
        user_vectors, item_vectors = (draw.integers(-2, 3, shape).astype(np.float32) for shape in shapes)
    else:
        user_vectors, item_vectors = (draw.standard_normal(shape).astype(np.float32) for shape in shapes)
        item_vectors[items // 2 :] = item_vectors[: items - items // 2]
        if kind == "exact":
            user_vectors, item_vectors = np.round(user_vectors * 64) / 64, np.round(item_vectors * 64) / 64
    evaluated = draw.permutation(users)[: max(1, users // 2)]
    crowded = np.setdiff1d(np.arange(items), draw.integers(0, items, 2))
    return Case(
        torch.from_numpy(user_vectors),
        torch.from_numpy(item_vectors),
        pairs(draw.choice(evaluated, held_out), draw.integers(0, items, held_out)),
        [
            pairs(draw.integers(0, users, masked), draw.integers(0, items, masked)),
            pairs(np.full(len(crowded), evaluated[0]), crowded),
        ],
    )


def inner(users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    return users @ items.T


def evaluate(case: Case, ks: tuple[int, ...] = KS) -> Ranked:
    """The evaluator's result; in a group of processes, each process passes its own rows."""
    world = World.current()
    users, items = Partition(len(case.users), world.size), Partition(len(case.items), world.size)
    evaluator = Evaluator(world, users, items, case.held_out, case.masked, ks)
    return evaluator.rank(
        case.users[users.start(world.rank) : users.stop(world.rank)],
        case.items[items.start(world.rank) : items.stop(world.rank)],
        inner,
    )


def plain_rankings(case: Case, scores: torch.Tensor) -> dict[int, tuple[list[int], set[int]]]:
    """For each user with held-out items: all unmasked items in the order of the ranking, and the held-out items."""
    masked: dict[int, set[int]] = {}
    for rows in case.masked:
        for user, item in zip(rows.user.tolist(), rows.item.tolist()):
            masked.setdefault(user, set()).add(item)
    held: dict[int, set[int]] = {}
    for user, item in zip(case.held_out.user.tolist(), case.held_out.item.tolist()):
        held.setdefault(user, set()).add(item)
    out = {}
    for user in sorted(held):
        row = scores[user].tolist()
        candidates = [item for item in range(len(case.items)) if item not in masked.get(user, ())]
        out[user] = sorted(candidates, key=lambda item: (-row[item], item)), held[user]
    return out


def plain_metrics(rankings: dict[int, tuple[list[int], set[int]]], ks: tuple[int, ...] = KS) -> dict[str, float]:
    """The formulas of docs/methods/alignrec.md section 5.3, written out literally."""
    out = {}
    for k in ks:
        rows = []
        for ranking, held in rankings.values():
            hit = [1 if item in held else 0 for item in ranking[:k]]
            reach = min(k, len(held))
            rows.append(
                {
                    "recall": sum(hit) / len(held),
                    "ndcg": sum(h / math.log2(p + 2) for p, h in enumerate(hit))
                    / sum(1 / math.log2(p + 2) for p in range(reach)),
                    "precision": sum(hit) / k,
                    "map": sum(h * sum(hit[: p + 1]) / (p + 1) for p, h in enumerate(hit)) / reach,
                    "hit": float(any(hit)),
                }
            )
        for name in rows[0]:
            out[f"{name}@{k}"] = sum(row[name] for row in rows) / len(rows)
    return out
