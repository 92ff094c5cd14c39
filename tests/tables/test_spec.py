import math

import numpy as np
import pytest

from distrec.config.run import OptimizerSection
from distrec.data import keyed
from distrec.parallel.partition import Partition
from distrec.tables.spec import Table, plan_tables, xavier_uniform


@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (40, 8), (500, 64)])
def test_xavier_values_follow_the_formula_and_do_not_depend_on_the_block(rows: int, dim: int):
    key = ("table", "user", 7)
    whole = xavier_uniform(key, rows, dim, 0, rows)
    assert (whole.shape, whole.dtype) == ((rows, dim), np.float32)
    bound = math.sqrt(6 / (rows + dim))
    draws = keyed.uniform(key, 0, rows * dim).reshape(rows, dim)
    assert np.array_equal(whole, (bound * (2 * draws - 1)).astype(np.float32))
    assert np.abs(whole).max() <= bound
    if rows * dim > 1000:
        assert np.abs(whole).max() > 0.99 * bound
        assert whole.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    for start in range(0, rows, 7):
        for stop in (start, start + 1, rows):
            assert np.array_equal(xavier_uniform(key, rows, dim, start, stop), whole[start:stop])
    assert not np.array_equal(whole, xavier_uniform(("table", "item", 7), rows, dim, 0, rows))


@pytest.mark.parametrize(
    ("optimizer", "copies"),
    [({"name": "adam"}, 3), ({"name": "adamw"}, 3), ({"name": "sgd"}, 1), ({"tables": "sparse"}, 0)],
)
def test_the_plan_counts_rows_and_bytes_of_the_worker_with_most_rows(optimizer: dict[str, str], copies: int):
    tables = [Table("user", "user", 8), Table("content", "item", 100)]
    section = OptimizerSection(**optimizer)
    plan = plan_tables(tables, {"user": Partition(10, 4), "item": Partition(2, 4)}, section)
    kernel = "fused" if section.tables == "sparse" else "dense"
    common = {"sharding": "row_wise", "kernel": kernel}
    assert plan == [
        {"table": "user", "rows": 10, "dim": 8, "rows_per_worker": 3, "bytes_per_worker": 96 * (1 + copies)} | common,
        {"table": "content", "rows": 2, "dim": 100, "rows_per_worker": 1, "bytes_per_worker": 400 * (1 + copies)}
        | common,
    ]
