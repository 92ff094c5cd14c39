"""A small dataset, and an uninterrupted sweep over it."""

from __future__ import annotations

from pathlib import Path

import pytest

from distrec.cli import main
from distrec.errors import DONE
from tests.distributed import SharedCluster
from tests.training import small
from tests.tuning.planted import write_sweep
from tests.tuning.sweeps import METHODS, SECTIONS


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small.write_small(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: str, shared_cluster: SharedCluster) -> Path:
    """The folder of a sweep that ran from start to end without interruption."""
    shared_cluster.start()
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main(["tune", write_sweep(folder, data, METHODS, **SECTIONS)]) == DONE
    return folder / "sweep"
