"""What all replays share: set weights, repeat the recorded steps, and compare tables, gradients and metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from distrec.data.dataset import Interactions
from distrec.data.sampling import Triples
from distrec.evaluation.ranking import Evaluator
from distrec.graph.matrix import ShardedMatrix
from distrec.methods.base import Representations
from distrec.training.engine import Engine
from tests.oracle.compare import Row, absolute, entries, relative
from tests.oracle.fixture import Fixture
from tests.oracle.gather import rows_of, sparse_entries


def set_table(engine: Engine, table: str, values: np.ndarray) -> None:
    """Write a whole table `[rows, dim]`."""
    partition, rank = engine.tables.partition(table), engine.world.rank
    mine = values[partition.start(rank) : partition.stop(rank)]
    rows_of(engine, table).copy_(torch.from_numpy(np.ascontiguousarray(mine, np.float32)))


def replay_steps(
    fixture: Fixture,
    engine: Engine,
    told: Callable[[dict[str, float]], list[Row]],
    graded: Callable[[], list[Row]],
    stepped: Callable[[], list[Row]] = list,
) -> tuple[list[dict[str, float]], list[Row]]:
    """Repeat all steps; report the first step's terms, its gradients, and the weights after its update."""
    every, report = [], []
    for step in range(len(fixture["batch/users"])):
        columns = (fixture[f"batch/{name}"][step] for name in ("users", "pos", "neg"))
        terms, _ = engine.forward_backward(0, step, Triples(*columns, rows=np.empty(0, np.int64)))
        every.append(terms)
        report += [*told(terms), *graded()] if step == 0 else []
        engine.update()
        report += stepped() if step == 0 else []
    return every, report


def compare_terms(
    fixture: Fixture, terms: Mapping[str, float], names: Mapping[str, tuple[str, float, float]]
) -> list[Row]:
    """Loss terms by (key, weight in the total, tolerance), and the total."""
    rows = [
        relative(f"out/{key}", np.array(terms[term] / weight), fixture[f"out/{key}"], tolerance)
        for term, (key, weight, tolerance) in names.items()
        if term in terms
    ]
    return [*rows, relative("out/loss_total", np.array(sum(terms.values())), fixture["out/loss_total"], 1e-5)]


def stacked(engine: Engine, final: Representations) -> np.ndarray:
    """All users, then all items."""
    whole, space = engine.world.gather_blocks, engine.space
    parts = whole(final.users.contiguous(), space.users), whole(final.items.contiguous(), space.items)
    values: np.ndarray = torch.cat(parts).detach().numpy()
    return values


def compare_matrix(fixture: Fixture, engine: Engine, key: str, matrix: ShardedMatrix, tolerance: float = 1e-6) -> Row:
    """Compare a sharded matrix with `graph/KEY`."""
    return entries(f"graph/{key}", sparse_entries(engine.world, matrix), recorded(fixture, key), tolerance)


def recorded(fixture: Fixture, key: str) -> dict[tuple[int, int], float]:
    """The entries of `graph/KEY`; entries at the same place are added."""
    out: dict[tuple[int, int], float] = {}
    row, column = fixture[f"graph/{key}_indices"]
    for r, c, value in zip(row.tolist(), column.tolist(), fixture[f"graph/{key}_values"].tolist(), strict=True):
        out[r, c] = out.get((r, c), 0.0) + value
    return out


def user_item_entries(engine: Engine, matrix: ShardedMatrix) -> dict[tuple[int, int], float]:
    """The user x item part, whichever side has the rows."""
    found = sparse_entries(engine.world, matrix)
    if engine.space.users.total < engine.space.items.total:  # the longer side is the row side
        found = {(user, item): value for (item, user), value in found.items()}
    return found


def both_ways(upper: Mapping[tuple[int, int], float], users: int) -> dict[tuple[int, int], float]:
    """The adjacency matrix over stacked users and items."""
    there = {(user, users + item): value for (user, item), value in upper.items()}
    return there | {(column, row): value for (row, column), value in there.items()}


def compare_metrics(
    fixture: Fixture, engine: Engine, final: Representations, prefix: str, masks: Mapping[str, list[Interactions]]
) -> list[Row]:
    """Compare `metrics/PREFIX{valid,test}_…`; each split's rankings leave out the given interactions."""
    names, rows = fixture.keys("metrics"), []
    ks = sorted({int(name.rpartition("@")[2]) for name in names})
    for split, mask in masks.items():
        held_out, space = engine.space.data.interactions(split), engine.space
        evaluator = Evaluator(engine.world, space.users, space.items, held_out, mask, ks)
        metrics = evaluator.rank(final.users, final.items, engine.method.score).metrics()
        start = f"{prefix}{split}_"
        for name in names:
            if name.startswith(start):
                key = f"metrics/{name}"
                rows.append(absolute(key, np.array(metrics[name.removeprefix(start)]), fixture[key], 1e-6))
    return rows
