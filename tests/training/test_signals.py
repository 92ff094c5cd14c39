"""Ctrl-C and SIGTERM save a checkpoint and exit with status 130; the same command continues from there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from distrec.cli import main
from distrec.config import load_run
from distrec.errors import Interrupted
from distrec.methods.registry import resolve
from distrec.training.launch import TRAIN, _run_here
from distrec.training.run_folder import RunFolder, checkpoint_place
from tests.training import small

EPOCHS = 20
STOP = [signal.SIGINT, signal.SIGTERM]
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small.write_small(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(tmp_path: Path, data: str) -> str:
    """A run that trains for some seconds."""
    return small.write_config(
        tmp_path / "run.yaml", data, tmp_path, train={"global_batch": 8, "epochs": EPOCHS, "eval_every": 10}
    )


@contextmanager
def command(home: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`distrec train` in a process of its own, which is killed at the end of the block."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HOME": str(home),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "distrec.cli", "train", *arguments], cwd=REPOSITORY, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    children: list[psutil.Process] = []
    try:
        yield process
    finally:
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait(10)


def wait_for_epoch(process: subprocess.Popen[str], run: Path, epoch: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        try:
            if small.read(run, "progress.json")["epoch"] >= epoch:
                return
        except (OSError, ValueError):
            pass
        time.sleep(0.01)
    pytest.fail(f"epoch {epoch} was not reached in time")


def stop_and_read(process: subprocess.Popen[str], signum: signal.Signals, run: Path) -> None:
    """Send the signal; check the status, the message and the checkpoint that it names."""
    process.send_signal(signum)
    out, told = process.communicate(timeout=90)
    assert process.returncode == 130, told
    assert "saving a checkpoint first" in out
    line = told.strip().splitlines()[-1]
    name = small.checkpoints(run)[-1]
    epoch, step = checkpoint_place(name)
    steps = small.read(run, "progress.json")["steps"]
    place = f"in epoch {epoch + 1} after step {step} of {steps}" if step else f"after epoch {epoch} of {EPOCHS}"
    assert line == f"distrec train: stopped {place}; the same command continues from there.", told
    assert small.read(run, "run.json")["attempts"][-1]["exit_status"] == 130
    assert not (run / "summary.json").exists()


def compare(config: str, tmp_path: Path, exact: bool) -> None:
    """Finish the run and compare it with one that was never stopped."""
    assert main(["train", config]) == 0
    assert main(["train", config, "run.name=whole"]) == 0
    whole, run = tmp_path / "whole", tmp_path / "run"
    small.same_losses(whole, run, rtol=0 if exact else 1e-5)
    assert [epoch["replayed"] for epoch in small.metrics(run)] == [0] * EPOCHS
    want, got = small.tensors(whole), small.tensors(run)
    small.same_tensors(want, got, lr=1e-3, steps=EPOCHS * 69)
    assert not exact or all(want[name].equal(got[name]) for name in want)


def test_a_stopped_run_goes_on_to_the_same_end(tmp_path: Path, config: str) -> None:
    """The process that trains is stopped once with each signal."""
    for epoch, signum in zip((2, 8), STOP, strict=True):
        with command(tmp_path, config) as process:
            wait_for_epoch(process, tmp_path / "run", epoch)
            stop_and_read(process, signum, tmp_path / "run")
    compare(config, tmp_path, exact=True)


@pytest.mark.multiprocess
def test_stopped_workers_go_on_to_the_same_end(tmp_path: Path, config: str) -> None:
    with command(tmp_path, config, "train.workers=2") as process:
        wait_for_epoch(process, tmp_path / "run", 2)
        descendants = psutil.Process(process.pid).children(recursive=True)
        stop_and_read(process, signal.SIGTERM, tmp_path / "run")
    _, alive = psutil.wait_procs(descendants, timeout=20)
    assert alive == []  # the local cluster ends with the command
    compare(config, tmp_path, exact=False)


def test_a_signal_while_starting_ends_at_once(tmp_path: Path, config: str) -> None:
    with command(tmp_path, config) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:  # wait until torch is being loaded, long before the first step
            if any("libtorch" in area.path for area in psutil.Process(process.pid).memory_maps()):
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told.strip().splitlines()[-1] == "distrec train: interrupted"
    assert main(["train", config, "train.epochs=1"]) == 0


@pytest.mark.parametrize(("reason", "outcome"), [("stop", "Interrupted"), ("resize", None), ("preempted", None)])
def test_workers_end_an_attempt_only_if_the_user_stops_it(tmp_path: Path, reason: str, outcome: str | None) -> None:
    """After the other reasons, the same attempt starts workers again."""
    config = resolve(load_run(small.write_config(
        tmp_path / "run.yaml", small.write_small(tmp_path / "data"), tmp_path,
        train={"epochs": 2000, "patience": 2000, "global_batch": 8},
    )))  # fmt: skip
    run = RunFolder.of(config)
    run.open_attempt(config, "hash")
    run.request_stop(reason)
    with pytest.raises(Interrupted):
        _run_here(config, TRAIN, {"attempt": 1})
    assert run.record["attempts"][0].get("outcome") == outcome
