"""Training on Ray Train: killed workers, resources, failures. All on the cluster that tests share."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from distrec.cli import main
from tests.training import small

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
    tmp_path: Path, data: str, cluster: None, last: int
) -> None:
    """The first command recovers from one kill and ends after the second; later commands use other worker counts."""
    config = small.write_config(
        tmp_path / "run.yaml", data, tmp_path, "alignrec",
        train={"global_batch": 16, "epochs": 12, "checkpoint_every": 10, "max_failures": 1},
    )  # fmt: skip
    run = tmp_path / "run"
    assert main(["train", config, "run.name=whole"]) == 0
    killer = Killer(run, epochs=[2, 5], every=10)
    killer.start()
    assert main(["train", config, "train.workers=2"]) == 1
    killer.join(30)
    first, second = (progress["epoch"] for progress in killer.killed_at)
    assert main(["train", config, "train.workers=0", f"train.epochs={second + 1}", "dense.zero_stage=1"]) == 0
    assert main(["train", config, f"train.workers={last}", "dense.zero_stage=3"]) == 0

    small.same_losses(tmp_path / "whole", run, rtol=1e-5)
    tables = small.tensors(tmp_path / "whole"), small.tensors(run)
    small.same_tensors(*tables, lr=1e-3, steps=12 * killer.killed_at[0]["steps"])
    epochs = small.metrics(run)
    assert [epoch["epoch"] for epoch in epochs if epoch["replayed"]] == sorted({first, second})
    assert [epoch["workers"] for epoch in epochs] == [2] * (second - 1) + [1] * 2 + [max(last, 1)] * (11 - second)
    attempts = small.read(run, "run.json")["attempts"]
    assert [(attempt["workers"], attempt["zero_stage"]) for attempt in attempts] == [(2, 0), (0, 1), (last, 3)]
    assert [attempt.get("outcome") for attempt in attempts] == [None, "done", "done"]
    assert main(["evaluate", str(run)]) == 0


def test_more_cpus_than_the_cluster_offers_are_refused(
    tmp_path: Path, data: str, cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path)
    for overrides, asked in ((["train.workers=5"], "2.5"), (["train.workers=3", "train.cpus_per_worker=1"], "3")):
        capsys.readouterr()
        assert main(["train", config, *overrides]) == 2
        (message,) = capsys.readouterr().err.splitlines()
        told = ("'train.workers'", "'train.cpus_per_worker'", f"{asked} CPUs", "offers 2")
        assert [part for part in told if part not in message] == []
    assert not (tmp_path / "run").exists()


def test_a_loss_that_overflows_on_workers_ends_with_status_3_at_once(
    tmp_path: Path, data: str, cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path, optimizer={"name": "sgd", "lr": 1e30})
    assert main(["train", config, "train.workers=1"]) == 3
    assert "loss term 'bpr'" in capsys.readouterr().err
    assert len(os.listdir(tmp_path / "run/ray")) == 1  # not tried again


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
