"""Whole sweeps with Ray Tune: what they leave behind, and that nothing is lost or done twice whoever is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from distrec.cli import main
from distrec.errors import BAD_INPUT, DONE, FAILED, INTERRUPTED
from tests.training import small
from tests.tuning.planted import write_sweep

pytestmark = pytest.mark.multiprocess

REPOSITORY = Path(__file__).resolve().parents[2]
METHODS: dict[str, dict[str, Any]] = {
    "lightgcn": {"space": {"method.layers": [1, 2, 3]}, "train": {"global_batch": 8, "epochs": 8}},
    "bprmf": {
        "space": {"method.reg": {"low": 1e-5, "high": 1e-2, "log": True}},
        "train": {"global_batch": 8, "epochs": 8},
    },
}
TRIAL = "ImplicitFunc"  # how Ray titles the process of a trial that is a function
SECTIONS: dict[str, Any] = {"budget": {"trials": 5, "min_trials": 2}, "resources": {"cpus_per_worker": 1}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small.write_small(tmp_path_factory.mktemp("data"))


class Command:
    """`distrec tune` in a process of its own, and its Ray cluster's processes."""

    def __init__(self, config: str, home: Path, *arguments: str):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HOME": str(home),
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        }
        environment.pop("RAY_ADDRESS", None)
        self.log = home / "log"
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "distrec.cli", "tune", config, *arguments], cwd=REPOSITORY, env=environment,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def processes(self, *words: str) -> list[psutil.Process]:
        """Living processes of the cluster whose title or command has one of `words`."""
        found = []
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if any(word in " ".join(process.cmdline()) for word in words):
                        found.append(process)
        return found

    def wait(self, seconds: float) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the sweep did not end in {seconds} s:\n{self.log.read_text()[-3000:]}")

    def end(self) -> None:
        """Leave nothing behind."""
        left = self.processes("")
        if self.process.poll() is None:
            self.process.kill()
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(10)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    commands: list[Command] = []

    def begin(config: str, *arguments: str) -> Command:
        commands.append(Command(config, tmp_path, *arguments))
        return commands[-1]

    yield begin
    for command in commands:
        command.end()


def trials(sweep: Path, phase: str = "trials") -> dict[str, dict[str, Any]]:
    """The records of a phase's trials by id."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted((sweep / phase).glob("*/trial.json"))}


def results(sweep: Path) -> dict[str, Any]:
    """What every trial and every winner's seed found, apart from how long it took."""
    found = {}
    for phase in ("trials", "final"):
        for name in trials(sweep, phase):
            run = sweep / phase / name
            epochs = [(record["epoch"], record["loss"], record.get("valid")) for record in small.metrics(run)]
            summary = small.read(run, "summary.json")
            found[f"{phase}/{name}"] = (epochs, summary["valid"], summary.get("test"))
    return found


def attempts(run: Path) -> int:
    return len(small.read(run, "run.json")["attempts"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """A sweep that ran from start to end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = Command(write_sweep(folder, data, METHODS, **SECTIONS), folder)
    try:
        assert command.wait(300) == DONE, command.log.read_text()
    finally:
        command.end()
    return folder / "sweep"


def test_a_sweep_chooses_on_validation_and_reads_test_for_the_winners_alone(undisturbed: Path) -> None:
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


def test_checkpoints_stay_for_the_best_trial_of_a_method_alone(undisturbed: Path) -> None:
    winners = set(json.loads((undisturbed / "sweep.json").read_text())["winners"].values())
    kept = {path.parent.name for path in (undisturbed / "trials").glob("*/checkpoints")}
    assert kept == winners


def test_a_finished_sweep_runs_nothing_again(undisturbed: Path, start: Callable[..., Command]) -> None:
    before = {str(path): path.stat().st_mtime_ns for path in undisturbed.glob("*/*/*.json")}
    assert start(str(undisturbed.parent / "sweep.yaml")).wait(120) == DONE
    assert {str(path): path.stat().st_mtime_ns for path in undisturbed.glob("*/*/*.json")} == before


def test_whoever_is_killed_nothing_is_lost_and_nothing_finished_runs_twice(
    tmp_path: Path, data: str, undisturbed: Path, start: Callable[..., Command]
) -> None:
    """SIGKILL at random moments to a trial's process, to Ray's node, to Ray's head service, and to the driver."""
    config, sweep = write_sweep(tmp_path, data, METHODS, **SECTIONS), tmp_path / "sweep"
    seed = random.randrange(1 << 30)
    print(f"moments drawn with seed {seed}")
    moment = random.Random(seed)
    finished: dict[str, tuple[int, int]] = {}

    def look() -> None:
        """What has finished so far must stay as it is."""
        for summary in sweep.glob("trials/*/summary.json"):
            now = (attempts(summary.parent), summary.stat().st_mtime_ns)
            assert finished.setdefault(summary.parent.name, now) == now, f"{summary.parent} ran again"
        for record in sweep.glob("final/*/trial.json"):
            if json.loads(record.read_text())["status"] == "done":
                now = (attempts(record.parent), (record.parent / "summary.json").stat().st_mtime_ns)
                assert finished.setdefault(record.parent.name, now) == now, f"{record.parent} ran again"

    for victim in ("trial", "raylet/raylet", "gcs_server", "driver"):
        command = start(config)
        begun = time.monotonic() + 60
        while not command.processes(TRIAL) and time.monotonic() < begun and command.process.poll() is None:
            time.sleep(0.2)
        time.sleep(moment.uniform(0, 12))
        look()
        if victim == "driver":
            command.process.kill()
        else:
            for process in command.processes(TRIAL if victim == "trial" else victim)[:1]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        if victim == "trial":
            time.sleep(moment.uniform(2, 6))
            command.process.kill()
        command.wait(150)
        command.end()
        look()
    assert start(config).wait(300) == DONE, (tmp_path / "log").read_text()[-3000:]
    look()
    assert all(trial["status"] == "done" for phase in ("trials", "final") for trial in trials(sweep, phase).values())
    assert results(sweep) == results(undisturbed)


def test_a_trial_that_dies_is_retried_from_its_checkpoint_and_one_that_fails_does_not_stop_the_rest(
    tmp_path: Path, data: str, start: Callable[..., Command]
) -> None:
    methods = {
        "lightgcn": {"train": {"global_batch": 8, "epochs": 60, "patience": 60}},
        "bprmf": {"overrides": {"optimizer.name": "sgd", "optimizer.lr": 1e30}},  # its loss is not finite
    }
    sweep = tmp_path / "sweep"
    command = start(write_sweep(tmp_path, data, methods, budget={"trials": 2}))
    run, deadline = sweep / "trials" / "lightgcn-000", time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in command.processes(TRIAL):
        process.kill()
    assert command.wait(240) == DONE, command.log.read_text()
    record = trials(sweep)
    assert record["lightgcn-000"]["status"] == "done"
    assert record["lightgcn-000"]["failures"] == 1
    assert attempts(run) == 2
    assert [epoch["epoch"] for epoch in small.metrics(run)] == list(range(1, 61))
    assert record["bprmf-000"]["status"] == "failed"
    assert "NonFiniteLoss" in record["bprmf-000"]["reason"]
    assert set(trials(sweep, "final")) == {"lightgcn-seed2"}


def test_trials_of_several_workers_stop_by_the_scheduler_and_on_ctrl_c(
    tmp_path: Path, data: str, start: Callable[..., Command]
) -> None:
    methods = {"bprmf": {"space": {"method.dim": [4, 12, 16]}, "train": {"global_batch": 8, "epochs": 9}}}
    config = write_sweep(
        tmp_path, data, methods, budget={"trials": 4}, scheduler="asha", asha={"grace": 2, "factor": 2},
        resources={"workers": 2, "cpus_per_worker": 0.5},
    )  # fmt: skip
    sweep = tmp_path / "sweep"
    command, deadline = start(config), time.monotonic() + 120
    while not list((sweep / "trials").glob("*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    command.process.send_signal(signal.SIGINT)
    assert command.wait(120) == INTERRUPTED, command.log.read_text()
    command.end()
    assert start(config).wait(400) == DONE, (tmp_path / "log").read_text()
    record = trials(sweep)
    assert attempts(sweep / "trials" / min(record)) == 2
    assert {trial["status"] for trial in record.values()} == {"done", "stopped"}
    stopped = [name for name, trial in record.items() if trial["status"] == "stopped"]
    for name in (
        stopped
    ):  # training goes on until Ray Tune has ended the processes, so more epochs than the decision took may stand
        values = [epoch["valid"]["recall@20"] for epoch in small.metrics(sweep / "trials" / name)]
        assert len(values) >= 2
        assert record[name]["value"] in values
    final = small.read(sweep / "final" / "bprmf-seed2", "run.json")
    assert final["world_size"] == 2


def test_a_population_survives_its_driver_and_a_clones_config_repeats_its_way(
    tmp_path: Path, data: str, start: Callable[..., Command]
) -> None:
    methods: dict[str, dict[str, Any]] = {
        "alignrec": {
            "space": {"optimizer.lr": {"low": 1e-3, "high": 1e-1, "log": True}, "method.sim_weight": [0.1, 0.3, 0.5]},
            "train": {"epochs": 6},
        },
        "bprmf": {"space": {"method.dim": [4, 12]}},
    }
    config = write_sweep(
        tmp_path, data, methods, budget={"trials": 6, "min_trials": 3}, scheduler="pbt", pbt={"interval": 2}
    )  # fmt: skip
    sweep, deadline = tmp_path / "sweep", time.monotonic() + 200
    command = start(config)
    while not list((sweep / "trials").glob("*-epoch2")) and time.monotonic() < deadline:
        time.sleep(0.1)
    command.process.kill()
    command.wait(60)
    command.end()
    assert start(config).wait(300) == DONE, (tmp_path / "log").read_text()[-3000:]
    assert "bprmf: no parameter of its space may change while it trains" in (tmp_path / "log").read_text()
    record = trials(sweep)
    clones = {name: trial for name, trial in record.items() if trial["parent"]}
    assert sorted(trial["born"] for trial in clones.values()) == [2, 4]
    assert sum(trial["status"] == "done" for trial in record.values()) == 6
    assert all(trial["status"] in ("done", "stopped") for trial in record.values())
    for name, clone in clones.items():
        mine, donors = (small.metrics(sweep / "trials" / run) for run in (name, clone["parent"]))
        assert mine[: clone["born"]] == donors[: clone["born"]]
        assert mine[clone["born"] :] != donors[clone["born"] :]
    name = max((n for n in clones if clones[n]["status"] == "done"), key=lambda name: len(clones[name]["past"]))
    own = [f"run.storage={tmp_path}", "run.name=again", "run.graphs=null"]
    assert main(["train", str(sweep / "trials" / name / "config.yaml"), *own]) == DONE
    again, first = small.metrics(tmp_path / "again"), small.metrics(sweep / "trials" / name)
    assert [(epoch["loss"], epoch["valid"]) for epoch in again] == [(epoch["loss"], epoch["valid"]) for epoch in first]
    assert len(again) == 6
    assert {trial["entry"] for trial in trials(sweep, "final").values()} == {"alignrec", "bprmf"}
    assert main(["report", str(sweep)]) == DONE
    told = (sweep / "report.md").read_text()
    assert "3 of 3, 2 clones" in told  # a clone and whom it replaced are one trial
    assert told.count("from epoch 2 a clone of") == told.count("from epoch 4 a clone of") == 1
    assert "population-based training" in told


def test_resources_that_no_node_has_are_told_at_once(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = {"bprmf": {"train": {"global_batch": 1000}}}
    config = write_sweep(tmp_path, data, methods, resources={"workers": 1000})
    assert main(["tune", config]) == BAD_INPUT
    assert "asks for 1000 CPUs per trial, but the cluster offers" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_of_which_every_trial_fails_says_why(tmp_path: Path, data: str, start: Callable[..., Command]) -> None:
    methods = {"bprmf": {"overrides": {"optimizer.name": "sgd", "optimizer.lr": 1e30}}}
    command = start(write_sweep(tmp_path, data, methods, budget={"trials": 1}))
    assert command.wait(120) in (FAILED, BAD_INPUT)
    assert "no trial of the sweep" in command.log.read_text()
    assert "NonFiniteLoss" in command.log.read_text()


def test_a_sweep_lives_in_an_object_store(tmp_path: Path, s3: str, capsys: pytest.CaptureFixture[str]) -> None:
    from distrec.data.storage import open_folder

    data = small.write_small(f"{s3}/data")
    methods = {"bprmf": {"space": {"method.reg": [1e-3]}}, "popularity": {}}
    config = write_sweep(
        tmp_path, data, methods, run={"name": "sweep", "storage": f"{s3}/sweeps"}, budget={"trials": 3}
    )
    assert main(["tune", config]) == DONE
    assert main(["tune", config]) == DONE  # finds all of it again
    folder = open_folder(f"{s3}/sweeps/sweep")
    assert folder.names("trials") == ["bprmf-000", "bprmf-001", "popularity-000"]
    assert {folder.read_json("trials", name, "trial.json")["status"] for name in folder.names("trials")} == {"done"}
    assert folder.names("final") == ["bprmf-seed2", "popularity-seed2"]
    assert folder.names("winners") == ["bprmf.yaml", "popularity.yaml"]
    assert main(["report", f"{s3}/sweeps/sweep"]) == DONE
    assert folder.exists("report.html")
    assert not list(tmp_path.glob("sweep/*"))
