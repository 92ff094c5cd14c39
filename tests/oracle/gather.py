"""Whole tensors from an engine's blocks, under the fixture's names. All functions are collective."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from distrec.graph.matrix import ShardedMatrix
from distrec.parallel.world import World
from distrec.training.engine import Engine


def rows_of(engine: Engine, table: str) -> torch.Tensor:
    """My rows of a table, to write to."""
    return engine.tables.block(table).detach()


def table_weights(engine: Engine, names: dict[str, str]) -> dict[str, np.ndarray]:
    """Whole tables."""
    return {
        name: engine.world.gather_blocks(rows_of(engine, table), engine.tables.partition(table)).numpy().copy()
        for name, table in names.items()
    }


def table_gradients(engine: Engine, names: dict[str, str]) -> dict[str, np.ndarray]:
    """Gradients of whole tables, after backward and before the step."""
    out = {}
    for name, table in names.items():
        block = engine.tables.block(table)
        grad = torch.zeros_like(block) if block.grad is None else block.grad
        out[name] = engine.world.gather_blocks(grad, engine.tables.partition(table)).numpy()
    return out


def dense_gradients(engine: Engine) -> dict[str, np.ndarray]:
    """Gradients of dense parameters by name."""
    return {name: grad.numpy() for name, grad in engine.dense.gradients().items()}


def sparse_entries(world: World, matrix: ShardedMatrix) -> dict[tuple[int, int], float]:
    """All entries of a sharded matrix, read from its products with blocks of unit vectors."""
    columns = matrix.column_partition
    first = columns.start(world.rank)
    identity = torch.eye(columns.total)[first : columns.stop(world.rank)]
    dense = matrix.times_values(identity)
    mine = {
        (row + matrix.row_partition.start(world.rank), column): float(dense[row, column])
        for row, column in dense.nonzero().tolist()
    }
    if world.size == 1:
        return mine
    everyone: list[dict[tuple[int, int], float]] = [{} for _ in range(world.size)]
    dist.all_gather_object(everyone, mine)
    return {key: value for part in everyone for key, value in part.items()}
