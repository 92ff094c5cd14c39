"""The real engine repeats both recorded runs of BiVRec's released prototype; numbers that are changed are found."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.distributed import run_workers
from tests.oracle import bivrec
from tests.oracle.compare import Row, table
from tests.oracle.fixture import Fixture
from tests.oracle.replay import several

PATH = Path(__file__).parent / "fixtures/bivrec.npz"
STAGES = {1: [0], 2: [0, 1, 2, 3], 3: [0]}


def results() -> set[str]:
    """The keys of all outputs of the program in both runs, without the weights whose true gradient is zero."""
    keys = set()
    for prefix, run in bivrec.runs(Fixture(str(PATH))).items():
        for kind in ("out", "grad", "after", "metrics"):
            keys |= {f"{prefix}{kind}/{key}" for key in run.keys(kind) if key not in run["noisegrad"].tolist()}
    return keys


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory):
    """The rows by ZeRO stage for a number of workers, made once; one worker also replays a changed file."""
    folder = tmp_path_factory.mktemp("oracle")
    bivrec.dataset(Fixture(str(PATH)), folder / "data")

    @cache
    def made(size: int) -> dict[int | str, list[Row]]:
        runs = {stage: ("bivrec", str(PATH), stage, str(folder / "data")) for stage in STAGES[size]}
        if size == 1:
            arrays = dict(np.load(PATH))
            for key in results():
                arrays[key] = arrays[key] + 1e-3 * max(1.0, np.abs(arrays[key]).max())
            np.savez(folder / "spoiled.npz", **arrays)
            runs["spoiled"] = ("bivrec", str(folder / "spoiled.npz"), 0, str(folder / "data"))
        found = run_workers(several, size, list(runs.values()), timeout=500)
        assert all(rows == found[0] for rows in found), "every rank sees the same rows"
        return dict(zip(runs, found[0], strict=True))

    return made


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", STAGES)
def test_every_key_is_within_its_tolerance(reports, size: int):
    for stage in STAGES[size]:
        rows = reports(size)[stage]
        assert all(row.holds for row in rows), f"ZeRO {stage}\n{table(rows)}"


@pytest.mark.multiprocess
def test_every_key_of_the_published_file_is_compared(reports):
    compared = {row.key for row in reports(1)[0]}
    assert results() - compared == set()
    assert {"nograd", "close/nograd", "batch/valid_items", "close/batch/test_items"} <= compared


@pytest.mark.multiprocess
def test_a_thousandth_off_is_told_on_every_key_and_on_no_other(reports):
    assert {row.key for row in reports(1)["spoiled"] if not row.holds} == results()
    assert len(results()) > 200
