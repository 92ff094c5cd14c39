"""Feature blocks against the whole array in one process; `test_sharded` runs the same check in several processes."""

from pathlib import Path

import torch

from distrec.tables.features import unit_rows
from tests.tables import feature_blocks


def test_one_process(tmp_path: Path):
    feature_blocks.write(tmp_path)
    feature_blocks.check(str(tmp_path))


def test_unit_rows_leave_zero_rows_zero():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-6, 0.0]])
    assert torch.allclose(unit_rows(rows), torch.tensor([[0.6, 0.8], [0.0, 0.0], [1.0, 0.0]]))
