"""Small sharded tables for tests: two with random initial values, one that starts from given rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from distrec.config.run import OptimizerSection
from distrec.parallel.partition import Partition
from distrec.parallel.world import World
from distrec.tables.spec import Table

SEED, USERS, WIDTH = 3, 13, 8
ITEMS = {"exact": 2, "sparse": 5}  # with 2 items, one of 3 processes owns none


def given_rows(items: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(items, 4)).astype(np.float32)


def tables(world: World, optimizer: dict[str, Any], items: int | None = None) -> Any:
    from distrec.tables.sharded import ShardedTables

    items = items or ITEMS[optimizer.get("tables", "exact")]
    given = given_rows(items)
    specs = [
        Table("user", "user", WIDTH),
        Table("item", "item", WIDTH),
        Table("given", "item", 4, lambda key, rows, dim, start, stop: given[start:stop]),
    ]
    sides = {"user": Partition(USERS, world.size), "item": Partition(items, world.size)}
    return ShardedTables(world, specs, sides, OptimizerSection(**optimizer), SEED)  # type: ignore[arg-type]
