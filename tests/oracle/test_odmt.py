"""The real engine repeats the published numbers of ODMT's two runs; numbers that are changed are found."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from tests.distributed import run_workers
from tests.oracle import odmt
from tests.oracle.compare import Row, recorded_key, table
from tests.oracle.fixture import Fixture
from tests.oracle.replay import FOLDER, several

FILE = str(FOLDER / "odmt.npz")
STAGES = {1: [0], 2: [0, 1, 2, 3], 3: [0]}
PREFIXES = [f"{run}{kind}/" for run in ("", "tied/") for kind in ("out", "grad", "after", "metrics")]


def results() -> set[str]:
    """The keys of all outputs of the program."""
    return {key for prefix in PREFIXES for key in np.load(FILE).files if key.startswith(prefix)}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory):
    """The rows by ZeRO stage for a number of workers, made once; one worker also replays changed files."""
    folder = tmp_path_factory.mktemp("oracle")
    odmt.dataset(Fixture(FILE), folder / "data")

    def spoiled(name: str, keys: set[str]) -> str:
        """The file with these keys changed by a thousandth of their largest entry, or by 5e-5 if that is more."""
        arrays = dict(np.load(FILE))
        for key in keys:
            arrays[key] = arrays[key] + 1e-3 * max(np.abs(arrays[key]).max(), 0.05)
        np.savez(folder / name, **arrays)
        return str(folder / name)

    @cache
    def made(size: int) -> dict[int | str, list[Row]]:
        runs: dict[int | str, tuple[str, int]] = {stage: (FILE, stage) for stage in STAGES[size]}
        if size == 1:
            runs["results"] = (spoiled("results.npz", results()), 0)
            runs["popularity"] = (spoiled("popularity.npz", {"data/popularity"}), 0)
        calls = [("odmt", path, stage, str(folder / "data")) for path, stage in runs.values()]
        found = run_workers(several, size, calls, timeout=500)
        assert all(rows == found[0] for rows in found), "every rank sees the same rows"
        return dict(zip(runs, found[0], strict=True))

    return made


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_key_is_within_its_tolerance(reports, size: int):
    for stage in STAGES[size]:
        rows = reports(size)[stage]
        assert all(row.holds for row in rows), f"ZeRO {stage}\n{table(rows)}"


@pytest.mark.multiprocess
def test_every_key_of_the_published_file_is_compared(reports):
    compared = {recorded_key(row) for row in reports(1)[0]}
    assert results() - compared == set()
    for run in ("", "tied/"):
        inputs = {f"{run}{key}" for key in ("data/popularity", "data/train_sequences", "init/id_encoder.weight")}
        assert inputs | {f"{run}nograd", f"{run}hparams/distill_weight"} <= compared


@pytest.mark.multiprocess
def test_a_thousandth_off_is_told_on_every_key_and_on_no_other(reports):
    spoiled = results()
    rows = [row for row in reports(1)["results"] if row.measure != "every element, lr"]
    assert {row.key for row in rows if not row.holds} == {row.key for row in rows if recorded_key(row) in spoiled}
    assert len(spoiled) > 300


@pytest.mark.multiprocess
def test_a_wrong_popularity_is_told(reports):
    exceeded = {row.key for row in reports(1)["popularity"] if not row.holds}
    assert exceeded == {"data/popularity", "tied/data/popularity"}
