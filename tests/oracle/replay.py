"""Replaying a fixture through the real engine in gloo processes."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from distrec.runtime import quiet
from tests.distributed import run_workers
from tests.oracle import alignrec, bivrec, mentor, odmt, stair
from tests.oracle.compare import Row
from tests.oracle.fixture import Fixture

FOLDER = Path(__file__).parent / "fixtures"
METHODS: dict[str, ModuleType] = {
    "alignrec": alignrec,
    "mentor": mentor,
    "stair": stair,
    "odmt": odmt,
    "bivrec": bivrec,
}


def work(method: str, path: str, zero_stage: int, data: str) -> list[Row]:
    """One worker's part of a replay."""
    quiet()
    from distrec.data.dataset import Dataset
    from distrec.parallel.world import World
    from distrec.training.engine import Engine

    whole, kind = Fixture(path), METHODS[method]
    rows: list[Row] = []
    for prefix in ("", *getattr(kind, "FURTHER_RUNS", ())):
        if prefix and not whole.keys(prefix):
            continue
        fixture = whole.under(prefix) if prefix else whole
        engine = Engine(World.current(), Dataset.open(data), kind.config(fixture, zero_stage))
        start = f"{prefix}/" if prefix else ""
        rows += [replace(row, key=start + row.key) for row in kind.replay(fixture, engine)]
    return rows


def several(runs: list[tuple[str, str, int, str]]) -> list[list[Row]]:
    """One worker's part of several replays."""
    return [work(*run) for run in runs]


def run(method: str, path: str, workers: int, zero_stage: int) -> list[Row]:
    """All rows of a replay with `workers` gloo processes."""
    with tempfile.TemporaryDirectory() as folder:
        METHODS[method].dataset(Fixture(path), Path(folder))
        rows: list[Row] = run_workers(work, workers, method, path, zero_stage, folder)[0]
    return rows
