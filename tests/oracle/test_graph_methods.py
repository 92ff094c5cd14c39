"""The real engine repeats the published numbers of STAIR and MENTOR; numbers that are changed are found."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.distributed import run_workers
from tests.oracle.compare import Row, recorded_key, table
from tests.oracle.fixture import Fixture
from tests.oracle.replay import FOLDER, METHODS, several

STAGES = {"stair": {1: [0], 2: [0], 3: [0]}, "mentor": {1: [0], 2: [0, 1, 2, 3], 3: [0]}}
PREFIXES = ("out", "grad", "after", "after1", "after32", "metrics")
# Values from recorded draws that are added to out/loss_steps: they have no gradient and cannot be repeated.
TAKEN = {"mentor": {"out/loss_mask_steps"}, "stair": set()}


def results(fixture: Fixture, method: str) -> set[str]:
    """The keys of all outputs of the program."""
    return {f"{prefix}/{key}" for prefix in PREFIXES for key in fixture.keys(prefix)} - TAKEN[method]


def spoil(method: str, keys: set[str], path: Path) -> str:
    """The fixture with these keys changed by a thousandth of their largest entry."""
    arrays = dict(np.load(FOLDER / f"{method}.npz"))
    for key in keys:
        arrays[key] = arrays[key] + 1e-3 * (np.abs(arrays[key]).max() or 1)
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory):
    """The rows by (method, ZeRO stage) for a number of workers, made once; one worker also replays changed files."""
    folder = tmp_path_factory.mktemp("oracle")
    for method in STAGES:
        METHODS[method].dataset(Fixture(str(FOLDER / f"{method}.npz")), folder / method)

    @cache
    def made(size: int) -> dict[tuple[str, int | str], list[Row]]:
        runs: dict[tuple[str, int | str], tuple[str, str, int, str]] = {
            (method, stage): (method, str(FOLDER / f"{method}.npz"), stage, str(folder / method))
            for method, stages in STAGES.items()
            for stage in stages[size]
        }
        for method in STAGES if size == 1 else ():
            spoils = {"results": results(Fixture(str(FOLDER / f"{method}.npz")), method), "graph": {"graph/S_values"}}
            for name, keys in spoils.items():
                path = spoil(method, keys, folder / f"{method} {name}.npz")
                runs[method, name] = (method, path, 0, str(folder / method))
        found = run_workers(several, size, list(runs.values()), timeout=500)
        assert all(rows == found[0] for rows in found), "every rank sees the same rows"
        return dict(zip(runs, found[0], strict=True))

    return made


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("method", STAGES)
def test_every_key_is_within_its_tolerance(reports, method: str, size: int):
    for stage in STAGES[method][size]:
        rows = reports(size)[method, stage]
        assert all(row.holds for row in rows), f"{method}, ZeRO {stage}\n{table(rows)}"


@pytest.mark.multiprocess
@pytest.mark.parametrize("method", STAGES)
def test_every_key_of_the_published_file_is_compared(reports, method: str):
    compared = {recorded_key(row) for row in reports(1)[method, 0]}
    assert results(Fixture(str(FOLDER / f"{method}.npz")), method) - compared == set()
    graphs = {"stair": {"graph/A", "graph/S", "graph/b"}, "mentor": {"graph/S", "graph/edge_index", "nograd"}}
    assert graphs[method] <= compared


@pytest.mark.multiprocess
@pytest.mark.parametrize("method", STAGES)
def test_a_thousandth_off_is_told_on_every_key_and_on_no_other(reports, method: str):
    spoiled = results(Fixture(str(FOLDER / f"{method}.npz")), method)
    rows = [row for row in reports(1)[method, "results"] if row.measure != "every element, lr"]
    assert {row.key for row in rows if not row.holds} == {row.key for row in rows if recorded_key(row) in spoiled}
    assert len(spoiled) > 20


@pytest.mark.multiprocess
@pytest.mark.parametrize("method", STAGES)
def test_a_wrong_graph_is_told(reports, method: str):
    exceeded = {row.key for row in reports(1)[method, "graph"] if not row.holds}
    assert "graph/S" in exceeded
    assert "graph/A" not in exceeded
