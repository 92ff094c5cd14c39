"""Saving while training goes on, in the background on an object store; by the clock; and never half a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distrec.cli import main
from distrec.config import RunConfig, load_run
from distrec.data.dataset import Dataset
from distrec.data.storage import Folder, open_folder
from distrec.errors import StorageError
from distrec.methods.registry import resolve
from distrec.parallel.world import World
from distrec.training import checkpoint
from distrec.training.checkpoint import Checkpoints, is_complete
from distrec.training.engine import Engine
from distrec.training.loop import Trainer, fit, load_weights
from distrec.training.run_folder import RunFolder, TakenOver, checkpoint_name
from distrec.training.saving import SAVE, STOP, Saver
from tests.distributed import run_workers
from tests.training import small
from tests.training.steps import full, train_steps
from tests.training.test_checkpoint import assert_same


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small.write_small(tmp_path_factory.mktemp("data"))


def opened(path: Path, data: str, storage: str, method: str = "alignrec", **sections: Any) -> RunConfig:
    """A resolved config whose run has an attempt."""
    config = resolve(load_run(small.write_config(path, data, storage, method, **sections)))
    RunFolder.of(config).open_attempt(config, Dataset.open(data).hash)
    return config


def names(config: RunConfig) -> list[str]:
    return RunFolder.of(config).checkpoints.names()


# --- a save in the background -----------------------------------------------------------------------------------------


class Stage:
    """An engine that trains, and a saver whose writing can be held up."""

    def __init__(self, config: RunConfig, data: str):
        self.world, self.run = World.current(), RunFolder.of(config)
        self.engine = Engine(self.world, Dataset.open(data), config)
        self.checkpoints = Checkpoints(self.run.checkpoints, self.world)
        self.required: Any = None  # raised when rank 0 looks whether the run was taken over for the n-th time, by n
        self.looks = 0
        self.saver = Saver(self.checkpoints, self.run, self.require)
        self.gate = threading.Event()
        self.gate.set()
        self.steps = 0
        write = checkpoint.write_tensors

        def gated(*arguments: Any) -> Any:
            assert self.gate.wait(60)
            return write(*arguments)

        checkpoint.write_tensors = gated

    def require(self) -> None:
        self.looks += 1
        if self.required and self.looks == self.required[0]:
            raise self.required[1]

    def train(self, count: int) -> None:
        train_steps(self.engine, self.steps, self.steps + count)
        self.steps += count

    def save(self, name: str, needed: set[str], told: list[float] | None = None) -> dict[str, np.ndarray]:
        """Save; returns the state as it is now."""
        want = full(self.engine)
        tensors = {
            **self.engine.state(),
            "ledger": torch.zeros(self.engine.samples_per_epoch, dtype=torch.uint8),
        }
        state, told = {"optimizer_steps": self.steps}, [] if told is None else told
        self.saver.save(name, tensors, state, needed, time.perf_counter(), told.append)
        return want

    def spoil(self) -> None:
        """Change every tensor in place, as no optimizer would."""
        for value in self.engine.state().values():
            (value.to_local() if hasattr(value, "to_local") else value).fill_(7)

    def loaded(self, config: RunConfig, data: str, name: str) -> dict[str, np.ndarray]:
        engine = Engine(self.world, Dataset.open(data), config)
        load_weights(engine, Checkpoints(self.run.checkpoints, self.world), name)
        return full(engine)


def in_flight(stage: Stage, config: RunConfig, data: str) -> None:
    """Two saves in a row while training goes on; each holds the state of its time."""
    told: list[float] = []
    first, second = checkpoint_name(0, 3), checkpoint_name(0, 5)
    stage.train(3)
    stage.gate.clear()
    early = stage.save(first, {first}, told)
    stage.train(2)  # with collectives, as the thread has
    assert not is_complete(stage.run.checkpoints.folder(first))
    assert stage.saver.newest is None
    stage.world.barrier()
    stage.gate.set()
    late = stage.save(second, {second}, told)  # waits for the first
    assert stage.saver.newest == first
    assert is_complete(stage.run.checkpoints.folder(first))
    stage.spoil()
    stage.train(1)
    stage.saver.wait()
    assert stage.saver.newest == second
    assert len(told) == (2 if stage.world.rank == 0 else 0)
    for name, want in ((first, early), (second, late)):
        got = stage.loaded(config, data, name)
        assert want.keys() == got.keys()
        assert [key for key in want if not np.array_equal(want[key], got[key])] == []
    third = checkpoint_name(0, 6)
    stage.save(third, {third})
    stage.saver.wait()
    stage.world.barrier()
    assert stage.run.checkpoints.names() == [second, third]  # the one before stays
    saved = stage.run.record["checkpoint"]
    assert saved["bytes"] == sum(
        entry["bytes"] for entry in (checkpoint.listed_files(stage.run.checkpoints.folder(third)) or {}).values()
    )
    assert saved["seconds"] > 0


def failing(stage: Stage) -> None:
    """An error on one rank ends the save of all, is raised by all at the next opportunity, and deletes nothing."""
    good, bad = checkpoint_name(0, 6), checkpoint_name(0, 7)
    stage.saver.resume(good, {good})
    before = stage.run.checkpoints.names()
    assert not stage.saver.due(0)
    write = checkpoint.write_tensors

    def broken(*arguments: Any) -> Any:
        if stage.world.rank == stage.world.size - 1:
            raise StorageError("the storage is away")
        return write(*arguments)

    checkpoint.write_tensors = broken
    stage.save(bad, {bad})
    stage.train(1)
    assert stage.saver._thread is not None
    stage.saver._thread.join(60)
    assert stage.saver.due(0)  # so rank 0 asks for the save that raises it
    with pytest.raises(StorageError, match=r"^the storage is away$"):
        stage.save(bad, {bad})
    checkpoint.write_tensors = write
    stage.looks, stage.required = 0, (2, TakenOver("another one has it"))  # not yet when the save begins
    stage.save(bad, {bad})
    with pytest.raises(TakenOver, match=r"^another one has it$"):
        stage.saver.wait()
    stage.world.barrier()
    assert stage.saver.newest == good
    assert is_complete(stage.run.checkpoints.folder(good))
    assert not stage.run.checkpoints.exists(bad, "complete.json")
    assert stage.run.checkpoints.exists(bad, "state.json")
    stage.world.barrier()
    stage.saver.resume(good, {good})
    assert stage.run.checkpoints.names() == before  # the torn one is gone

    def interrupted() -> None:
        with stage.saver:
            stage.save(bad, {bad})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):  # an error of training comes first, but the save is awaited
        interrupted()
    assert stage.saver.newest == bad


def stages(config: RunConfig, data: str) -> None:
    stage = Stage(config, data)
    in_flight(stage, config, data)
    failing(stage)


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [1, 2, 3])
def test_saving_while_training_goes_on(tmp_path: Path, data: str, s3: str, size: int) -> None:
    run_workers(stages, size, opened(tmp_path / "run.yaml", data, f"{s3}/runs"), data)


# --- whole runs -------------------------------------------------------------------------------------------------------


def trained(config: RunConfig, data: str, killed_at: int | None = None) -> None:
    """Train; rank 0 is killed when it completes a checkpoint for the `killed_at`-th time."""
    write, left = Folder.write_json, killed_at

    def killing(folder: Folder, value: Any, *parts: str) -> None:
        nonlocal left
        if parts == ("complete.json",) and left is not None:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        write(folder, value, *parts)

    Folder.write_json = killing  # type: ignore[method-assign]
    fit(World.current(), Dataset.open(data), config, 1)


@pytest.mark.multiprocess
def test_a_run_killed_before_a_checkpoint_is_complete_goes_on_from_the_one_before(
    tmp_path: Path, data: str, s3: str
) -> None:
    sections = {"train": {"checkpoint_every": 4}}
    whole = opened(tmp_path / "whole.yaml", data, str(tmp_path / "whole"), **sections)
    run_workers(trained, 2, whole, data)
    config = opened(tmp_path / "run.yaml", data, f"{s3}/runs", **sections)
    with pytest.raises(RuntimeError, match=r"workers \[0"):
        run_workers(trained, 2, config, data, 4)
    there = RunFolder.of(config)
    done, torn = [checkpoint_name(*place) for place in ((0, 8), (1, 0))], checkpoint_name(1, 4)
    assert names(config) == [*done, torn]
    assert not is_complete(there.checkpoints.folder(torn))
    assert [epoch["epoch"] for epoch in there.read_metrics()] == [1]
    run_workers(trained, 2, config, data)
    assert all(is_complete(there.checkpoints.folder(name)) for name in names(config))
    assert list(there.record["attempts"][-1]["damaged_checkpoints"]) == [torn]
    there.folder.fs.get(there.folder.path, str(tmp_path / "fetched"), recursive=True)
    assert_same(tmp_path / "whole/run", tmp_path / "fetched")


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_a_stop_waits_for_its_checkpoint(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch, where: str, request: pytest.FixtureRequest
) -> None:
    storage = str(tmp_path) if where == "disk" else f"{request.getfixturevalue('s3')}/runs"
    steps, write = iter(range(100)), checkpoint.write_tensors
    monkeypatch.setattr(Trainer, "_ask", lambda *_: {5: SAVE, 6: STOP}.get(next(steps), 0))
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *arguments: (time.sleep(0.2), write(*arguments))[1])
    config = small.write_config(tmp_path / "run.yaml", data, storage)
    assert main(["train", config]) == 130
    found = RunFolder.of(load_run(config)).checkpoints
    assert found.names() == [checkpoint_name(0, 6), checkpoint_name(0, 7)]
    assert all(is_complete(found.folder(name)) for name in found.names())


def test_epochs_are_told_once_their_checkpoint_is_complete(
    tmp_path: Path, data: str, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a run that is killed in between would have epochs without checkpoints."""
    told: list[tuple[int, bool]] = []
    write = RunFolder.write_metrics

    def watched(run: RunFolder, history: list[dict[str, Any]]) -> None:
        complete = is_complete(run.checkpoints.folder(checkpoint_name(len(history), 0)))
        told.append((len(history), complete))
        write(run, history)

    monkeypatch.setattr(RunFolder, "write_metrics", watched)
    config = small.write_config(tmp_path / "run.yaml", data, f"{s3}/runs", train={"patience": 50})
    assert main(["train", config, "train.epochs=4"]) == 0
    assert told[:-1] == [(epoch, True) for epoch in range(1, 5)]  # the last one is that of the summary
    run = RunFolder.of(load_run(config))
    assert all(epoch["seconds"]["checkpoint"] > 0 for epoch in run.read_metrics())


# --- by the clock -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("minutes", "newest"), [(1e-9, (1, 6)), (0, (1, 0)), (10, (1, 0))])
def test_checkpoints_by_the_clock(tmp_path: Path, data: str, minutes: float, newest: tuple[int, int]) -> None:
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path, train={"checkpoint_minutes": minutes})
    with small.crash_at((1, 6)):
        assert main(["train", config]) == 1
    assert small.checkpoints(tmp_path / "run")[-1] == checkpoint_name(*newest)


def clocks(config: RunConfig, data: str) -> None:
    """Rank 0 finds a save due after its third look; the other ranks always do."""
    world, looks = World.current(), iter(range(1000))
    Saver.due = lambda self, minutes: world.rank > 0 or next(looks) == 2  # type: ignore[method-assign]
    with small.crash_at((0, 7)), pytest.raises(RuntimeError, match="crash"):
        fit(world, Dataset.open(data), config)


@pytest.mark.multiprocess
def test_only_the_clock_of_the_first_worker_counts(tmp_path: Path, data: str) -> None:
    config = opened(tmp_path / "run.yaml", data, str(tmp_path))
    run_workers(clocks, 2, config, data)
    assert names(config) == [checkpoint_name(0, 3)]


# --- torn checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crash", [(0, 0), (0, 5)])
def test_torn_checkpoints_are_removed_when_a_run_is_restored(tmp_path: Path, data: str, crash: tuple[int, int]) -> None:
    """They would fill the disk. A complete one that was damaged later stays until newer ones replace it."""
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path, train={"checkpoint_every": 2})
    folder = tmp_path / "run/checkpoints"
    with small.crash_at(crash) if crash[1] else nullcontext():
        main(["train", config, *([] if crash[1] else ["train.epochs=0"])])
    whole = sorted(path.name for path in folder.glob("*"))
    for place in ((0, 1), (2, 0)):
        torn = folder / checkpoint_name(*place)
        torn.mkdir(parents=True)
        (torn / "rows-00000.safetensors").write_bytes(b"half")
    damaged = folder / checkpoint_name(1, 1)
    damaged.mkdir()
    (damaged / "complete.json").write_text("{}")
    with small.crash_at((0, crash[1] - crash[1] % 2)):
        assert main(["train", config]) == 1
    assert small.checkpoints(tmp_path / "run") == [*whole, damaged.name]
    assert not whole or open_folder(str(folder)).exists(whole[-1])
