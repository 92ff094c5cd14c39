"""Sweep folders whose files are damaged or foreign, and two attempts at one sweep."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distrec.cli import main
from distrec.config import load_run
from distrec.data.storage import open_folder
from distrec.errors import BAD_INPUT, InputError
from distrec.training.hold import Hold
from distrec.tuning.entries import resolve_entries
from distrec.tuning.folder import SweepFolder, Trial
from distrec.tuning.report.gather import gather
from distrec.tuning.sweep import load_sweep
from distrec.tuning.tune import Search
from tests.training import small
from tests.tuning.planted import write_sweep
from tests.tuning.planted_sweeps import TWO, plant, plant_data

JUNK = [b"", b"{", b"[]", b"3", b"null", b'"text"', b"{}", b"\xff\xfe\0{", b"[" * 100_000, b"9" * 5_000]


@pytest.fixture
def config(tmp_path: Path, data: str) -> str:
    return write_sweep(tmp_path, data, {"lightgcn": {"space": {"method.layers": [1, 2]}}})


@pytest.fixture
def attempt(config: str) -> Callable[[], Search]:
    """Opens the sweep as a newly started process does, without Ray."""

    def opened() -> Search:
        sweep = load_sweep(config)
        entries, folder = resolve_entries(sweep), SweepFolder.of(sweep)
        return Search(sweep, entries, folder, 1, folder.open_attempt(sweep, entries, "hash"))

    return opened


def changed(path: Path, changes: list[tuple[str, Any]]) -> list[bytes]:
    """A JSON file with other values under some keys, without each of these keys, and cut off."""
    whole = json.loads(path.read_text())
    without = [{key: value for key, value in whole.items() if key != gone} for gone, _ in changes]
    trees = [*({**whole, key: value} for key, value in changes), *without]
    return [*(json.dumps(tree).encode() for tree in trees), path.read_bytes()[:-9]]


def test_a_damaged_sweep_record_is_refused(tmp_path: Path, attempt: Callable[[], Search]) -> None:
    attempt()
    record = tmp_path / "sweep/sweep.json"
    changes = [("identity", []), ("attempts", 3), ("seconds", "long"), ("closed", 1)]
    for content in [*JUNK, *changed(record, changes)]:
        record.write_bytes(content)
        with pytest.raises(InputError, match=r"sweep\.json' cannot be used \(.*restore the file, use another"):
            attempt()
        assert record.read_bytes() == content


def test_a_damaged_trial_record_is_refused_and_an_absent_one_left_out(
    tmp_path: Path, attempt: Callable[[], Search]
) -> None:
    folder = attempt().folder
    folder.write_trial("trials", Trial("lightgcn-000", "lightgcn", 0, {}, 1, 1))
    (tmp_path / "sweep/trials/lightgcn-001").mkdir()
    (tmp_path / "sweep/trials/junk").write_text("")
    assert [trial.id for trial in attempt().trials] == ["lightgcn-000"]
    record = tmp_path / "sweep/trials/lightgcn-000/trial.json"
    changes = [("entry", 3), ("number", "0"), ("values", []), ("cpus", None), ("seed", 1.5), ("id", None)]
    wrong = [{"status": "over"}, {"past": [{"until": 3}]}, {"value": "high"}]
    whole = json.loads(record.read_text())
    for content in [*JUNK, *changed(record, changes), *(json.dumps(whole | keys).encode() for keys in wrong)]:
        record.write_bytes(content)
        with pytest.raises(InputError, match=r"lightgcn-000/trial\.json' cannot be used \(.*; delete '.*lightgcn-000'"):
            attempt()


def test_a_trial_whose_results_are_damaged_is_trained_again(tmp_path: Path, attempt: Callable[[], Search]) -> None:
    trial = Trial("lightgcn-000", "lightgcn", 0, {}, 1, 1, "running")
    folder = attempt().folder
    folder.write_trial("trials", trial)
    run = tmp_path / "sweep/trials/lightgcn-000"
    (run / "error.txt").write_bytes(b"\xff\xfe")
    for name in ("summary.json", "metrics.jsonl"):
        for content in JUNK:
            (run / name).write_bytes(content)
            (found,) = attempt().trials
            assert (found.status, found.value) == ("waiting", None)
    (run / "metrics.jsonl").write_text(json.dumps(small.planted_epoch(1, valid={"ndcg@5": 1.0})))  # of another metric
    assert attempt().trials[0].last is None
    assert folder.error("trials", trial) is not None


def test_winners_that_are_damaged_are_written_again(
    tmp_path: Path, attempt: Callable[[], Search], capsys: pytest.CaptureFixture[str]
) -> None:
    search = attempt()
    search.folder.write_trial("trials", Trial("lightgcn-000", "lightgcn", 0, {}, 1, 1, "done", 0.5))
    search = attempt()
    search._close()
    winner = tmp_path / "sweep/winners/lightgcn.yaml"
    whole = winner.read_bytes()
    for content in (None, b"", b"- 1", b"data: [", b"\xff\xfe\0", b"data: 3\n"):
        winner.unlink()
        if content is not None:
            winner.write_bytes(content)
        search.folder.mend_winners(search._winner_configs(search._winners()))
        assert winner.read_bytes() == whole
        assert f"'{winner}' was absent or damaged: it is written again" in capsys.readouterr().out
    search.folder.mend_winners(search._winner_configs(search._winners()))
    assert capsys.readouterr().out == ""
    assert load_run(winner).method["name"] == "lightgcn"
    search.folder.update_record(winners={"lightgcn": "lightgcn-007"})
    with pytest.raises(InputError, match="names trial 'lightgcn-007' as the winner of 'lightgcn'"):
        search._winners()


@pytest.mark.parametrize("name", ["sweep.yaml", "trials"])
def test_a_file_in_the_place_of_a_folder_and_the_reverse_are_refused(
    tmp_path: Path, attempt: Callable[[], Search], name: str
) -> None:
    attempt()
    path = tmp_path / "sweep" / name
    if path.exists():
        path.unlink()
        path.mkdir()
    else:
        path.write_text("")
    with pytest.raises(InputError, match=r"but a sweep keeps a f\w+ there; move it away"):
        attempt()


def test_a_sweep_that_is_running_is_left_alone(
    tmp_path: Path, config: str, attempt: Callable[[], Search], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = open_folder(str(tmp_path / "sweep"))
    with Hold(folder, "sweep", str(tmp_path)) as held:
        assert main(["tune", config]) == BAD_INPUT
        assert f"sweep '{folder}' is being run by process" in capsys.readouterr().err
        search = attempt()  # the holder's file is not taken for another folder's content
        search.folder.hold = held
        assert pickle.loads(pickle.dumps(search.folder)).hold is None  # Ray Tune pickles it
        trial = Trial("lightgcn-000", "lightgcn", 0, {}, 1, 1)
        search.folder.write_trial("trials", trial)
        folder.write_bytes(b"", "holder-000099.json")  # it was taken over
        for change in (lambda: search.folder.write_trial("trials", trial), lambda: search.folder.update_record(cpus=1)):
            with pytest.raises(InputError, match="was taken over by another process"):
                change()
        folder.remove("holder-000099.json")


def test_a_report_names_files_of_another_shape(tmp_path: Path) -> None:
    folder = plant(str(tmp_path / "sweep"), plant_data(str(tmp_path / "data")), TWO)
    for junk in (b"[3]", b"[" * 100_000, b'{"attempts": 3}', b'{"attempts": [4]}'):
        folder.write_bytes(junk, "trials", "odmt-001", "run.json")
        assert gather(str(folder))["unreadable"] == ["trials/odmt-001/run.json"]
    folder.remove("trials", "odmt-001", "run.json")
    settings = folder.read_bytes("sweep.yaml")
    for text in (b"", b"3", b"\xff\xfe\0", b"a: [", settings.replace(b"scheduler: asha", b"scheduler: []")):
        folder.write_bytes(text, "sweep.yaml")
        with pytest.raises(InputError, match=r"holds no sweep that can be read \(sweep.yaml: "):
            gather(str(folder))
