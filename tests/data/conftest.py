"""A source folder for the tests of importers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.data.raw import interactions, write


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, np.ndarray]:
    """Random interactions and a table of their items, by descending id, with one item that has no interaction."""
    columns = interactions(seed=1)
    write(tmp_path / "raw/interactions.parquet", columns)
    columns["items"] = np.append(np.unique(columns["i"])[::-1], 1000)
    write(tmp_path / "raw/items.parquet", {"i": columns["items"]})
    return columns
