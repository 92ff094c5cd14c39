"""Sweeps whose processes are killed or stopped: no result is lost, and no finished trial runs twice."""

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
from distrec.errors import DONE, INTERRUPTED
from tests.training import small
from tests.tuning.planted import write_sweep
from tests.tuning.sweeps import METHODS, SECTIONS, attempts, results, trials

pytestmark = pytest.mark.multiprocess

REPOSITORY = Path(__file__).resolve().parents[2]
TRIAL = "ImplicitFunc"  # Ray's title for the process of a trial that is a function


class Command:
    """`distrec tune` in its own process, with the processes of its Ray cluster."""

    def __init__(self, config: str, home: Path, *arguments: str):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HOME": str(home),
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "5",  # a driver whose head service died waits 60 s by default
        }
        environment.pop("RAY_ADDRESS", None)
        self.log = home / "log"
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "distrec.cli", "tune", config, *arguments], cwd=REPOSITORY, env=environment,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def processes(self, *words: str) -> list[psutil.Process]:
        """The running processes of the cluster whose title or command has one of `words`."""
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
        """Kill the command and all processes of its cluster."""
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


def trained(sweep: Path) -> int:
    """The total number of epochs that the sweep's runs have recorded."""
    return sum(len(file.read_bytes().splitlines()) for file in sweep.glob("*/*/metrics.jsonl"))


VICTIMS = ("trial", "gcs_server", "ctrl-c")
ALL_VICTIMS = (*VICTIMS, "raylet/raylet", "driver")
EPOCHS = 48  # of the 40 of the search and the 16 of the winners' seeds: the last kill may hit either


@pytest.mark.parametrize(
    ("seed", "victims"),
    [(0, VICTIMS), *(pytest.param(seed, ALL_VICTIMS, marks=pytest.mark.wide) for seed in (1, 2, 3))],
)
def test_after_any_kill_nothing_is_lost_and_nothing_finished_runs_twice(
    tmp_path: Path, data: str, undisturbed: Path, start: Callable[..., Command], seed: int, victims: tuple[str, ...]
) -> None:
    """Send SIGKILL to each of `victims` in turn; when a trial's process was killed, kill the driver after it.

    "ctrl-c" is SIGINT to the driver instead.

    The kills are spread over the sweep's epochs. A seed kills after the same numbers of epochs in any run.
    """
    config, sweep, draw = write_sweep(tmp_path, data, METHODS, **SECTIONS), tmp_path / "sweep", random.Random(seed)
    finished: dict[str, tuple[int, int]] = {}

    def check_finished() -> None:
        """Check that what had finished before has not changed."""
        for summary in sweep.glob("trials/*/summary.json"):
            now = (attempts(summary.parent), summary.stat().st_mtime_ns)
            assert finished.setdefault(summary.parent.name, now) == now, f"{summary.parent} ran again"
        for record in sweep.glob("final/*/trial.json"):
            if json.loads(record.read_text())["status"] == "done":
                now = (attempts(record.parent), (record.parent / "summary.json").stat().st_mtime_ns)
                assert finished.setdefault(record.parent.name, now) == now, f"{record.parent} ran again"

    def train_until(command: Command, epochs: int) -> None:
        """Wait until a trial runs and the sweep has recorded `epochs`."""
        deadline = time.monotonic() + 90
        while trained(sweep) < epochs or not command.processes(TRIAL):
            assert command.process.poll() is None, "the sweep ended before it could be disturbed"
            assert time.monotonic() < deadline, f"{epochs} epochs were not reached in time"
            time.sleep(0.05)

    for number, victim in enumerate(victims):
        command = start(config)
        train_until(command, draw.randrange(EPOCHS * number // len(victims), EPOCHS * (number + 1) // len(victims)))
        check_finished()
        if victim == "ctrl-c":
            command.process.send_signal(signal.SIGINT)
        elif victim != "driver":
            process = command.processes(TRIAL if victim == "trial" else victim)[0]
            process.kill()
        if victim == "trial":
            train_until(command, trained(sweep) + draw.randrange(3))
        if victim in ("trial", "driver"):
            command.process.kill()
        assert (command.wait(150) == INTERRUPTED) == (victim == "ctrl-c"), command.log.read_text()[-3000:]
        command.end()
        check_finished()
    assert finished, "no trial had finished before the last kill"
    assert start(config).wait(300) == DONE, (tmp_path / "log").read_text()[-3000:]
    check_finished()
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


@pytest.mark.wide
def test_the_scheduler_and_ctrl_c_stop_trials_of_several_workers(
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
    # Training continues until Ray Tune has ended the processes, so there may be epochs after the scheduler's decision.
    for name in stopped:
        values = [epoch["valid"]["recall@20"] for epoch in small.metrics(sweep / "trials" / name)]
        assert len(values) >= 2
        assert record[name]["value"] in values
    final = small.read(sweep / "final" / "bprmf-seed2", "run.json")
    assert final["world_size"] == 2


def test_a_population_survives_its_driver_and_a_clones_config_repeats_its_training(
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
    assert "bprmf: no parameter of its space may change while a run trains" in (tmp_path / "log").read_text()
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
    report = (sweep / "report.md").read_text()
    assert "3 of 3, 2 clones" in report  # a clone and the trial that it replaces count as one
    assert report.count("from epoch 2 a clone of") == report.count("from epoch 4 a clone of") == 1
    assert "population-based training" in report
