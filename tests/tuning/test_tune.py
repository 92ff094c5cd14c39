"""Whole sweeps with Ray Tune on a cluster that survives them, and the files that they leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distrec.cli import main
from distrec.errors import BAD_INPUT, DONE
from tests.training import small
from tests.tuning.planted import write_sweep
from tests.tuning.sweeps import METHODS, trials

pytestmark = pytest.mark.multiprocess


def test_a_sweep_chooses_on_validation_and_ranks_test_only_for_the_winners(undisturbed: Path) -> None:
    searched, finals = trials(undisturbed), trials(undisturbed, "final")
    assert len(searched) == 5
    assert all(trial["status"] == "done" for trial in [*searched.values(), *finals.values()])
    for name in searched:
        run = undisturbed / "trials" / name
        assert "test" not in small.read(run, "summary.json")
        assert "test" not in json.dumps(small.metrics(run))
        best = max(record["valid"]["recall@20"] for record in small.metrics(run))
        assert searched[name]["value"] == best
    record = json.loads((undisturbed / "sweep.json").read_text())
    for label, winner in record["winners"].items():
        mine = {name: trial["value"] for name, trial in searched.items() if trial["entry"] == label}
        assert mine[winner] == max(mine.values())
        config = small.read_yaml(undisturbed / "winners" / f"{label}.yaml")
        assert config["evaluate"]["test"]
        values = searched[winner]["values"]
        for key, value in values.items():
            section, _, field = key.partition(".")
            assert config[section][field] == value
    assert {trial["entry"] for trial in finals.values()} == METHODS.keys()
    for name, trial in finals.items():
        assert trial["seed"] != 1
        assert "test" in small.read(undisturbed / "final" / name, "summary.json")
        assert (undisturbed / "final" / name / "evaluation" / "test.json").exists()
    assert record["done"]


def test_only_the_best_trial_of_a_method_keeps_its_checkpoints(undisturbed: Path) -> None:
    winners = set(json.loads((undisturbed / "sweep.json").read_text())["winners"].values())
    kept = {path.parent.name for path in (undisturbed / "trials").glob("*/checkpoints")}
    assert kept == winners


def test_a_finished_sweep_runs_nothing_again(undisturbed: Path, cluster: None) -> None:
    before = {str(path): path.stat().st_mtime_ns for path in undisturbed.glob("*/*/*.json")}
    assert main(["tune", str(undisturbed.parent / "sweep.yaml")]) == DONE
    assert {str(path): path.stat().st_mtime_ns for path in undisturbed.glob("*/*/*.json")} == before


def test_resources_that_no_node_has_are_refused_at_once(
    tmp_path: Path, data: str, cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = {"bprmf": {"train": {"global_batch": 1000}}}
    for resources, told in (
        ({"workers": 1000, "wait_for_cluster": 0}, "asks for 1000 times 1 CPUs per trial, but after 0 s the cluster"),
        ({"workers": 1, "cpus_per_worker": 64}, "64 of them on one host, but the largest host of the cluster has 2"),
    ):
        assert main(["tune", write_sweep(tmp_path, data, methods, resources=resources)]) == BAD_INPUT
        assert told in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_whose_trials_all_fail_says_why(
    tmp_path: Path, data: str, cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = {"bprmf": {"overrides": {"optimizer.name": "sgd", "optimizer.lr": 1e30}}}
    assert main(["tune", write_sweep(tmp_path, data, methods, budget={"trials": 1})]) == BAD_INPUT
    printed = capsys.readouterr().err
    assert "no trial of the sweep" in printed
    assert "NonFiniteLoss" in printed


def test_the_scheduler_stops_trials(tmp_path: Path, data: str, cluster: None) -> None:
    methods = {"bprmf": {"space": {"method.dim": [4, 12, 16]}, "train": {"global_batch": 8, "epochs": 9}}}
    config = write_sweep(
        tmp_path, data, methods, budget={"trials": 4}, scheduler="asha", asha={"grace": 2, "factor": 2}
    )
    assert main(["tune", config]) == DONE
    record = trials(tmp_path / "sweep")
    assert {trial["status"] for trial in record.values()} == {"done", "stopped"}
    # Training continues until Ray Tune has ended the processes, so there may be epochs after the scheduler's decision.
    for name, trial in record.items():
        values = [epoch["valid"]["recall@20"] for epoch in small.metrics(tmp_path / "sweep" / "trials" / name)]
        assert len(values) >= 2
        assert trial["value"] in values


# Not on the shared cluster, whose processes do not have the environment variables of this test's bucket.
def test_trials_of_several_workers_in_an_object_store(tmp_path: Path, s3: str) -> None:
    from distrec.data.storage import open_folder

    data = small.write_small(f"{s3}/data")
    config = write_sweep(
        tmp_path, data, {"bprmf": {"train": {"epochs": 2}}}, run={"name": "sweep", "storage": f"{s3}/sweeps"},
        budget={"trials": 1}, resources={"workers": 2, "cpus_per_worker": 0.5},
    )  # fmt: skip
    assert main(["tune", config]) == DONE
    folder = open_folder(f"{s3}/sweeps/sweep")
    for run in ("trials/bprmf-000", "final/bprmf-seed2"):
        assert folder.read_json(run, "run.json")["world_size"] == 2
        assert folder.read_json(run, "summary.json")["epochs"] == 2
    assert main(["tune", config]) == DONE  # the sweep is finished, so nothing runs
    assert len(folder.read_json("trials/bprmf-000", "run.json")["attempts"]) == 1
    assert main(["report", f"{s3}/sweeps/sweep"]) == DONE
    assert folder.exists("report.html")
    assert not list(tmp_path.glob("sweep/*"))


@pytest.mark.wide
def test_a_sweep_can_be_stored_in_an_object_store(tmp_path: Path, s3: str) -> None:
    from distrec.data.storage import open_folder

    data = small.write_small(f"{s3}/data")
    methods = {"bprmf": {"space": {"method.reg": [1e-3]}}, "popularity": {}}
    config = write_sweep(
        tmp_path, data, methods, run={"name": "sweep", "storage": f"{s3}/sweeps"}, budget={"trials": 3}
    )
    assert main(["tune", config]) == DONE
    assert main(["tune", config]) == DONE  # the same command finds the finished sweep
    folder = open_folder(f"{s3}/sweeps/sweep")
    assert folder.names("trials") == ["bprmf-000", "bprmf-001", "popularity-000"]
    assert {folder.read_json("trials", name, "trial.json")["status"] for name in folder.names("trials")} == {"done"}
    assert folder.names("final") == ["bprmf-seed2", "popularity-seed2"]
    assert folder.names("winners") == ["bprmf.yaml", "popularity.yaml"]
    assert main(["report", f"{s3}/sweeps/sweep"]) == DONE
    assert folder.exists("report.html")
    assert not list(tmp_path.glob("sweep/*"))
