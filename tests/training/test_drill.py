"""`distrec drill`: what it refuses, its table, and a run on two hosts that survives it."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from distrec.cli import main
from distrec.cluster.processes import send
from distrec.config import load_run
from distrec.errors import InputError, Interrupted, WorkersFailed
from distrec.training import drill as drills
from distrec.training import policy
from distrec.training.drill import NotRecovered, Recovery, _Drill, drill, refusal, table
from distrec.training.heartbeat import Beat
from distrec.training.launch import train
from distrec.training.run_folder import RunFolder
from tests.training import small
from tests.training.hosts import Hosts

HOST = socket.gethostname()


@pytest.mark.parametrize(
    ("train", "epochs", "faults", "told"),
    [
        ({}, 1, 2, None),
        ({"workers": [1, 3], "max_failures": 1}, 6, 2, None),
        ({}, 7, 1, None),
        ({"workers": 0}, 1, 2, "trains without workers (key 'train.workers' is 0)"),
        ({"max_failures": 0}, 1, 2, "would end with the first fault, because key 'train.max_failures' is 0"),
        ({}, 0, 2, "has not finished an epoch"),
        ({}, 7, 2, "is about to end: 3 of 'train.epochs' 10 are left, and 2 faults need 4"),
        ({}, 8, 1, "is about to end: 2 of 'train.epochs' 10 are left, and 1 fault needs 3"),
        ({"epochs": 4}, 6, 2, "is about to end: 0 of"),
    ],
)
def test_only_what_a_run_survives_is_done(
    train: dict[str, Any], epochs: int, faults: int, told: str | None, tmp_path: Path
) -> None:
    settings = {"workers": 2, "epochs": 10, **train}
    config = load_run(small.write_config(tmp_path / "run.yaml", "data", tmp_path, train=settings))
    reason = refusal(config, epochs, faults)
    assert (reason is None) == (told is None)
    assert (told or "") in (reason or "")


def test_the_table_adds_the_seconds_up_and_counts_rows() -> None:
    start = {"processes": 4.0, "imports": 6.25, "restore": 0.5}
    lines = table([
        Recovery("kill", "worker 1 died; failure 1 of 3", 0.625, 0.125, start, lost=0, doubled=0),
        Recovery("freeze", "worker 0 did not answer", 41.0, 0.0, start | {"imports": 16.25}, lost=1200, doubled=3),
    ]).splitlines()  # fmt: skip
    head, kill, said, freeze, _ = (line.split() for line in lines[1:])
    columns = [
        "fault",
        "noticed",
        "waited",
        "processes",
        "imports",
        "restore",
        "next step",
        "rows lost",
        "rows doubled",
    ]
    assert head == " ".join(columns).split()
    assert kill == ["kill", "0.6", "0.1", "4.0", "6.2", "0.5", "11.5", "0", "0"]
    assert " ".join(said) == "worker 1 died; failure 1 of 3"
    assert freeze == ["freeze", "41.0", "0.0", "4.0", "16.2", "0.5", "61.8", "1,200", "3"]
    assert len({len(lines[number]) for number in (1, 2, 4)}) == 1  # the columns are straight


def test_nothing_but_a_worker_gets_a_signal() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert send(other.pid, signal.SIGKILL) == "is no worker of Ray Train any more"
        assert other.poll() is None
        other.communicate(timeout=60)
    assert send(other.pid, signal.SIGKILL) == "is gone"


def planted(folder: Path, finished: int, **train: Any) -> Path:
    """A run that nobody trains, with so many finished epochs; returns its folder."""
    config = load_run(small.write_config(folder / "run.yaml", "data", folder, train={"workers": 2, **train}))
    run = RunFolder.of(config)
    run.open_attempt(config, "hash")
    run.write_metrics([small.planted_epoch(number + 1) for number in range(finished)])
    return folder / "run"


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = planted(tmp_path, 3)
    assert main(["drill", str(run)]) == 2
    assert capsys.readouterr().err == (
        f"distrec drill: run '{run}' is about to end: 0 of 'train.epochs' 3 are left, and 2 faults need 4; drill a "
        "longer run.\n"
    )
    assert main(["drill", str(tmp_path)]) == 2
    assert "has no config.yaml" in capsys.readouterr().err


def test_a_run_that_ends_meanwhile_ends_the_drill(tmp_path: Path) -> None:
    run, config = RunFolder.existing(str(planted(tmp_path, 3)))
    watching = _Drill(run, config)
    run.note_outcome(WorkersFailed("worker 1 died."))
    with pytest.raises(NotRecovered, match=r"ended before the drill did \(WorkersFailed: worker 1 died\.\)"):
        watching._epochs_after(3, time.monotonic() + 60)
    assert len(watching._epochs_after(2, time.monotonic())) == 3  # what was waited for had been seen before the end


def test_ctrl_c_says_what_becomes_of_a_frozen_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    beats = {rank: Beat("host", "node", 10 + rank, 0.0, {"training": 1.0}) for rank in range(2)}
    monkeypatch.setattr(_Drill, "_training", lambda _: beats)
    monkeypatch.setattr(_Drill, "_monitors", lambda _: [])
    monkeypatch.setattr(drills, "signal_worker", interrupted)
    watching = _Drill(*RunFolder.existing(str(planted(tmp_path, 3))))
    for fault, told in (("kill", ""), ("freeze", "worker 1 (process 11 on host host) may be frozen until the run rep")):
        with pytest.raises(KeyboardInterrupt) as stop:
            watching._do(fault)
        assert told in str(stop.value)
        assert bool(told) == bool(str(stop.value))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.mktemp("home")) as started:
        yield started


def wait(ready: Callable[[], Any], running: Future[Any]) -> None:
    deadline = time.monotonic() + 150
    while not ready():
        assert not running.done(), running.result()
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.multiprocess
def test_a_run_on_two_hosts_survives_both_faults(
    tmp_path: Path, hosts: Hosts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(policy, "SILENT", {True: 3.0, False: 60.0})
    idle = planted(tmp_path / "idle", 3, epochs=100)
    with pytest.raises(InputError, match=f"nobody trains run '{idle}' with workers on the Ray cluster; start it"):
        drill(str(idle))
    for _ in range(2):
        hosts.add()
    config = small.write_config(
        tmp_path / "run.yaml", small.write_small(tmp_path / "data"), tmp_path, "lightgcn",
        train={"global_batch": 32, "epochs": 10_000, "patience": 10_000, "workers": 2, "max_failures": 1},
    )  # fmt: skip
    run = tmp_path / "run"
    with ThreadPoolExecutor() as pool:
        running = pool.submit(train, config)
        try:
            wait(lambda: (run / "metrics.jsonl").exists(), running)
            assert main(["drill", str(run)]) == 0
            told = capsys.readouterr().out
            monkeypatch.setattr(drills, "LIMIT", -1000.0)
            with pytest.raises(NotRecovered, match=r"did not finish an epoch in time; last seen (in|after) epoch"):
                drill(str(run))
        finally:
            RunFolder.existing(str(run))[0].request_stop()
        with pytest.raises(Interrupted):
            running.result(60)
    killed, frozen = small.read(run, "run.json")["attempts"][0]["restarts"]
    assert "died; failure 1 of 1 since the last finished epoch" in killed["cause"]
    named = re.search(rf"worker \d \(process (\d+) on host {HOST}\) did not answer for", frozen["cause"])
    assert named is not None, frozen["cause"]
    assert not psutil.pid_exists(int(named[1]))
    _, rows = told.rsplit("rows doubled\n", 1)
    kill, said_killed, freeze, said_frozen = rows.splitlines()[:4]
    assert (said_killed.strip(), said_frozen.strip()) == (killed["cause"], frozen["cause"])
    for name, line in (("kill", kill), ("freeze", freeze)):
        fault, *seconds, next_step, lost, doubled = line.split()
        assert (fault, lost, doubled) == (name, "0", "0")
        assert sum(map(float, seconds)) == pytest.approx(float(next_step), abs=0.5)
    assert float(freeze.split()[1]) >= 2.5  # not before the limit, less one heartbeat
    assert all(record["ledger"]["lost"] + record["ledger"]["duplicated"] == 0 for record in small.metrics(run))
