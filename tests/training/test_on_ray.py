"""Training on Ray Train: killed workers, resources, failures. All on the cluster that tests share."""

from __future__ import annotations

import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from distrec.cli import main
from distrec.training.run_folder import place_in_words
from tests.training import small

HOST = socket.gethostname()
pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small.write_small(tmp_path_factory.mktemp("data"))


class Killer(threading.Thread):
    """Kills a Ray Train worker of this process's cluster with signal 9, once in or after each of `epochs` (from 1).

    The worker is stopped first, so that the run's progress can be read: it must not be at a checkpoint.
    """

    def __init__(self, run: Path, epochs: list[int], every: int):
        super().__init__(daemon=True)
        self._run, self._epochs, self._every = run, epochs, every
        self.killed_at: list[dict[str, Any]] = []
        self.killed: list[int] = []

    def run(self) -> None:
        deadline = time.monotonic() + 500
        while self._epochs and time.monotonic() < deadline:
            workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in title(p)]
            while workers and all(worker.is_running() for worker in workers) and time.monotonic() < deadline:
                if self._progress().get("epoch", 0) >= self._epochs[0] and self._kill(workers[-1]):
                    self._epochs.pop(0)
                    break
                time.sleep(0.002)
            time.sleep(0.1)

    def _kill(self, worker: psutil.Process) -> bool:
        worker.send_signal(signal.SIGSTOP)
        time.sleep(0.2)  # the other workers block at the next collective
        progress = self._progress()
        if progress["step"] % self._every and progress["step"] < progress["steps"]:
            self.killed_at.append(progress)
            self.killed.append(worker.pid)
            worker.kill()
            worker.wait(10)
            return True
        worker.send_signal(signal.SIGCONT)
        return False

    def _progress(self) -> dict[str, Any]:
        try:
            progress: dict[str, Any] = small.read(self._run, "progress.json")
        except (OSError, ValueError):
            return {}
        return progress


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.parametrize("last", [0, pytest.param(3, marks=pytest.mark.wide)])
def test_workers_killed_at_two_go_on_at_two_and_end_at_other_sizes(
    tmp_path: Path, data: str, cluster: None, last: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first command recovers from two kills, between which it finished epochs; later ones use other sizes."""
    config = small.write_config(
        tmp_path / "run.yaml", data, tmp_path, "alignrec",
        train={"global_batch": 16, "epochs": 12, "checkpoint_every": 10, "max_failures": 1},
    )  # fmt: skip
    run = tmp_path / "run"
    assert main(["train", config, "run.name=whole"]) == 0
    killer = Killer(run, epochs=[2, 5], every=10)
    killer.start()
    capsys.readouterr()
    assert main(["train", config, "train.workers=2", "train.epochs=8"]) == 0
    killer.join(30)
    told = capsys.readouterr().out.splitlines()
    first, second = (progress["epoch"] for progress in killer.killed_at)
    assert main(["train", config, "train.workers=0", "train.epochs=10", "dense.zero_stage=1"]) == 0
    assert main(["train", config, f"train.workers={last}", "dense.zero_stage=3"]) == 0

    small.same_losses(tmp_path / "whole", run, rtol=1e-5)
    tables = small.tensors(tmp_path / "whole"), small.tensors(run)
    small.same_tensors(*tables, lr=1e-3, steps=12 * killer.killed_at[0]["steps"])
    epochs = small.metrics(run)
    assert [epoch["epoch"] for epoch in epochs if epoch["replayed"]] == [first, second]
    assert [epoch["workers"] for epoch in epochs] == [2] * 8 + [1] * 2 + [max(last, 1)] * 2
    attempts = small.read(run, "run.json")["attempts"]
    assert [(attempt["workers"], attempt["zero_stage"]) for attempt in attempts] == [(2, 0), (0, 1), (last, 3)]
    assert [attempt["outcome"] for attempt in attempts] == ["done"] * 3
    for restart, worker in zip(attempts[0]["restarts"], killer.killed, strict=True):
        assert f"(process {worker} on host {HOST}) died; failure 1 of 1" in restart["cause"]
        assert f"{restart['cause']}; starting again from the newest checkpoint" in told
        ended = restart["start"].pop("ended")
        assert not ended
        assert f"continuing {place_in_words(**restart['start'])}" in told
        assert list(restart["seconds"]) == ["processes", "imports", "restore"]
    assert main(["evaluate", str(run)]) == 0


def test_workers_that_fail_too_often_end_the_run_with_one_sentence(
    tmp_path: Path, data: str, cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small.write_config(
        tmp_path / "run.yaml", data, tmp_path, train={"global_batch": 8, "epochs": 100, "max_failures": 0}
    )
    killer = Killer(tmp_path / "run", epochs=[2], every=1000)
    killer.start()
    assert main(["train", config, "train.workers=1"]) == 1
    killer.join(30)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"distrec train: worker 0 (process {killer.killed[0]} on host {HOST}) died; ")
    (attempt,) = small.read(tmp_path / "run", "run.json")["attempts"]
    assert (attempt["outcome"], attempt["exit_status"]) == ("WorkersFailed", 1)
    assert line.endswith(attempt["message"])


def test_more_cpus_than_the_cluster_offers_are_refused(
    tmp_path: Path, data: str, cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path)
    for overrides, told in (
        (["train.workers=5"], ["room for 4 of 5", "1 host with 2 CPUs"]),
        (["train.workers=[3,4]", "train.cpus_per_worker=1"], ["'train.workers' is [3, 4]", "room for 2 of 3"]),
        (["train.workers=1", "train.cpus_per_worker=4"], ["4 of them on one host", "largest host", "has 2"]),
    ):
        capsys.readouterr()
        assert main(["train", config, "train.wait_for_cluster=0", *overrides]) == 2
        (message,) = capsys.readouterr().err.splitlines()
        assert [part for part in (*told, "'train.cpus_per_worker'", "lower one of them") if part not in message] == []
    assert not (tmp_path / "run").exists()


def test_a_loss_that_overflows_on_workers_ends_with_status_3_at_once(
    tmp_path: Path, data: str, cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path, optimizer={"name": "sgd", "lr": 1e30})
    assert main(["train", config, "train.workers=1"]) == 3
    assert "loss term 'bpr'" in capsys.readouterr().err
    assert "restarts" not in small.read(tmp_path / "run", "run.json")["attempts"][0]  # not tried again


def test_a_damaged_best_checkpoint_is_bad_input_on_workers_too(
    tmp_path: Path, data: str, cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path, train={"epochs": 1, "workers": 0})
    assert main(["train", config]) == 0
    best = small.read(tmp_path / "run", "summary.json")["best_checkpoint"]
    (rows,) = (tmp_path / "run/checkpoints" / best).glob("rows-*")
    content = bytearray(rows.read_bytes())
    content[-1] ^= 1
    rows.write_bytes(content)
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--workers", "1"]) == 2
    assert rows.name in capsys.readouterr().err
    assert not list((tmp_path / "run/evaluation").glob("error-*"))
