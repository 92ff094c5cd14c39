"""An invalid sweep is refused before any trial starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from distrec.cli import main
from distrec.data.dataset import Dataset
from distrec.errors import BAD_INPUT, InputError
from distrec.tuning.entries import resolve_entries
from distrec.tuning.execute import _PerMethod
from distrec.tuning.folder import SweepFolder, Trial
from distrec.tuning.sweep import PrepareSection, load_sweep
from distrec.tuning.tune import prepare_data, tune
from tests.data import raw
from tests.training import small
from tests.tuning.planted import write_sweep

LIGHT: dict[str, Any] = {"space": {"method.layers": [1, 2]}}


@pytest.mark.parametrize(
    ("methods", "sections", "told"),
    [
        ({}, {}, "'methods' is {} but"),
        ({"lightgcn": {"space": {"method.layer": [1, 2]}}}, {}, r"unknown key 'method.layer'; did you mean 'layers'\?"),
        ({"lightgcn": {"space": {"optimizer.learning": [1.0]}}}, {}, "unknown key 'optimizer.learning'"),
        ({"lightgcn": {}}, {"run": {"graphs": "kept"}}, "unknown key 'run.graphs'"),  # a sweep's trials share a folder
        ({"lightgcn": {"space": {"method.layers": [1, -2]}}}, {}, "key 'method.layers' is -2"),
        ({"lightgcn": {"space": {"optimizer.lr": {"low": -1.0, "high": 1.0}}}}, {}, "key 'optimizer.lr' is -1.0"),
        ({"lightgcn": {"space": {"train.seed": [1, 2]}}}, {}, "key 'train.seed' is not searched"),
        ({"lightgcn": {"spaces": ["publish"]}}, {}, "did you mean 'published'"),
        (
            {"lightgcn": {**LIGHT, "overrides": {"method.layers": 3}}},
            {},
            "searches 'method.layers', which 'overrides' sets to 3",
        ),
        (
            {"lightgcn": {"space": {"train.epochs": [1, 2]}}},
            {"budget": {"epochs": 5}},
            "which 'budget.epochs' limits",
        ),
        ({"lightgcn": LIGHT}, {"metric": "recall@7"}, r"key 'metric' is 'recall@7' but 'evaluate.ks' is .* add 7"),
        ({"lightgcn": LIGHT}, {"metric": "auc"}, "must be one of recall, ndcg"),
        ({"lightgcn": LIGHT, "bprmf": {}}, {"budget": {"trials": 1}}, "key 'budget.trials' is 1 but 2 methods"),
        ({"lightgcn": LIGHT}, {"budget": {"trials": None}}, "gives neither 'trials' nor 'hours'"),
        ({"light/gcn": {"method": "lightgcn"}}, {}, "must have plain labels"),
        (
            {"lightgcn": LIGHT},
            {"published": [{"entry": "lightgc", "source": "s", "metrics": {}}]},
            "did you mean 'lightgcn'",
        ),
        ({"lightgcn": LIGHT}, {"searchr": "random"}, "did you mean 'searcher'"),
    ],
)
def test_a_wrong_sweep_is_refused(
    tmp_path: Path,
    data: str,
    methods: dict[str, Any],
    sections: dict[str, Any],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_sweep(tmp_path, data, methods, **sections)
    for label in methods:
        (tmp_path / label / "search.yaml").write_text(yaml.safe_dump({"published": {"method.layers": [1, 2]}}))
    with pytest.raises(InputError, match=told):
        resolve_entries(load_sweep(path))
    assert main(["tune", path]) == BAD_INPUT
    assert "Traceback" not in capsys.readouterr().err


def test_two_spaces_that_disagree_are_refused_until_settled(tmp_path: Path, data: str) -> None:
    path = write_sweep(tmp_path, data, {"lightgcn": {"spaces": ["narrow", "wide"]}})
    (tmp_path / "lightgcn" / "search.yaml").write_text(
        yaml.safe_dump({"narrow": {"method.layers": [1]}, "wide": {"method.layers": [1, 2], "method.reg": [0.1, 0.2]}})
    )
    with pytest.raises(InputError, match=r"give different candidates for 'method\.layers'"):
        resolve_entries(load_sweep(path))
    path = write_sweep(tmp_path, data, {"lightgcn": {"spaces": ["narrow", "wide"], "space": {"method.layers": [2, 3]}}})
    assert resolve_entries(load_sweep(path))["lightgcn"].space == {"method.layers": [2, 3], "method.reg": [0.1, 0.2]}


def test_a_dataset_without_what_a_method_reads_is_told_with_the_method(tmp_path: Path, data: str) -> None:
    path = write_sweep(tmp_path, data, {"alignrec": {"overrides": {"method.features": ["audio"]}}})
    with pytest.raises(InputError, match=r"methods\.alignrec: .*audio"):
        tune(path)


def test_the_folder_of_another_sweep_is_not_touched(tmp_path: Path, data: str) -> None:
    first = load_sweep(write_sweep(tmp_path, data, {"lightgcn": LIGHT}))
    folder = SweepFolder.of(first)
    assert folder.open_attempt(first, resolve_entries(first), "hash")
    assert not folder.open_attempt(first, resolve_entries(first), "hash")
    more = load_sweep(write_sweep(tmp_path, data, {"lightgcn": LIGHT}, budget={"trials": 9}, seeds=3))
    assert not folder.open_attempt(more, resolve_entries(more), "hash")
    for methods, sections, told in (
        ({"lightgcn": {"space": {"method.layers": [1, 3]}}}, {}, "methods.lightgcn.space is"),
        ({"lightgcn": LIGHT, "bprmf": {}}, {}, "methods.bprmf"),
        ({"lightgcn": LIGHT}, {"metric": "ndcg@10"}, "metric is 'recall@20' there, now 'ndcg@10'"),
        ({"lightgcn": LIGHT}, {"seed": 2}, "seed is 1 there, now 2"),
    ):
        other = load_sweep(write_sweep(tmp_path, data, methods, **sections))
        with pytest.raises(InputError, match=told):
            folder.open_attempt(other, resolve_entries(other), "hash")
    with pytest.raises(InputError, match="data is 'hash' there, now 'other'"):
        folder.open_attempt(first, resolve_entries(first), "other")


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path, data: str) -> None:
    sweep = load_sweep(write_sweep(tmp_path, data, {"lightgcn": LIGHT}))
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds 'thesis.txt' but no sweep"):
        SweepFolder.of(sweep).open_attempt(sweep, resolve_entries(sweep), "hash")


def test_a_storage_that_cannot_be_written_is_refused(tmp_path: Path, data: str) -> None:
    (tmp_path / "file").touch()
    storage = str(tmp_path / "file/sweeps")
    sweep = load_sweep(write_sweep(tmp_path, data, {"lightgcn": LIGHT}, run={"name": "sweep", "storage": storage}))
    with pytest.raises(InputError, match=r"'run.storage' is '.*file/sweeps', which cannot be written"):
        SweepFolder.of(sweep).open_attempt(sweep, resolve_entries(sweep), "hash")


def test_a_sweep_makes_its_data_once_and_encodes_nothing_where_there_is_no_content(tmp_path: Path) -> None:
    raw.write(tmp_path / "raw" / "interactions.parquet", raw.interactions(1))
    section = PrepareSection(config=str(raw.config(tmp_path / "data.yaml")), source=str(tmp_path / "raw"))
    prepare_data(section, str(tmp_path / "out"))
    assert not Dataset.open(str(tmp_path / "out")).manifest.features
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    prepare_data(section, str(tmp_path / "out"))
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before


def test_a_continued_search_halves_among_all_its_trials(tmp_path: Path, data: str) -> None:
    """The rungs of successive halving hold the results of earlier attempts' trials, and nothing is judged twice."""
    path = write_sweep(
        tmp_path, data, {"lightgcn": {}, "bprmf": {}}, scheduler="asha", asha={"grace": 2, "factor": 2}
    )  # fmt: skip
    sweep = load_sweep(path)
    folder = SweepFolder.of(sweep)
    for number, value in enumerate([0.5, 0.6, 0.7, 0.3]):
        trial = Trial(f"lightgcn-00{number}", "lightgcn", number, {}, 1, 1, "done" if number < 3 else "waiting", value)
        folder.write_trial("trials", trial)
        folder.run("trials", trial).write_metrics(
            [small.planted_epoch(1), small.planted_epoch(2, valid={"recall@20": value})]
        )
    nobody: Any = None

    def verdict(scheduler: _PerMethod, label: str, name: str, epoch: int, value: float) -> str:
        trial: Any = SimpleNamespace(
            trial_id="drawn anew", config={"entry": label, "name": name, "run": {"train": {"epochs": 9}}}
        )
        scheduler.on_trial_add(nobody, trial)
        return scheduler.on_trial_result(nobody, trial, {"epoch": epoch, "best": value})

    assert verdict(_PerMethod(sweep, folder), "lightgcn", "lightgcn-004", 2, 0.1) == "STOP"
    assert verdict(_PerMethod(sweep, folder), "lightgcn", "lightgcn-004", 2, 0.9) == "CONTINUE"
    assert verdict(_PerMethod(sweep, folder), "bprmf", "bprmf-000", 2, 0.1) == "CONTINUE"
    continued = _PerMethod(sweep, folder)
    assert verdict(continued, "lightgcn", "lightgcn-003", 2, 0.3) == "CONTINUE"  # reported again
    assert verdict(continued, "lightgcn", "lightgcn-003", 3, 0.9) == "CONTINUE"
    assert verdict(continued, "lightgcn", "lightgcn-004", 4, 0.95) == "CONTINUE"
    assert verdict(continued, "lightgcn", "lightgcn-003", 4, 0.9) == "STOP"
