"""Damaged and hostile checkpoints: nothing goes unnoticed, nothing is deleted for it, and nothing in one runs."""

from __future__ import annotations

import errno
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distrec.cli import main
from distrec.data.storage import Folder, open_folder
from distrec.parallel.world import World
from distrec.training.checkpoint import Checkpoints
from distrec.training.loop import Trainer
from tests.training import small
from tests.training.torn import TEARS, flip, tensor_file


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small.write_small(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """A finished run whose best epoch is not its last, with dense weights. Tests work on copies of it."""
    folder = tmp_path_factory.mktemp("finished")
    config = small.write_config(folder / "run.yaml", data, folder, "alignrec", train={"epochs": 3})
    assert main(["train", config]) == 0
    return folder / "run"


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_noticed(tmp_path: Path, finished: Path) -> None:
    """Every file; of small files every byte, of large ones the header, both ends and random places."""
    (name, *_) = small.checkpoints(finished)
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    rng = np.random.default_rng(1)

    def defect() -> str | None:
        return Checkpoints(open_folder(str(tmp_path / "checkpoints")), World(0, 1)).defect(name)

    assert defect() is None
    paths = sorted((tmp_path / "checkpoints" / name).iterdir())
    assert {path.name.split("-")[0] for path in paths} == {"complete.json", "rows", "state.json", "whole"}
    for path in paths:
        data = path.read_bytes()
        places = range(len(data)) if path.name == "complete.json" else [0, 7, 8, 9, -1, *rng.integers(0, len(data), 20)]
        for place in places:
            flip(path, place, bit := int(rng.integers(8)))
            assert defect(), (path.name, place, bit)
            path.write_bytes(data)
    assert defect() is None


def test_a_damaged_best_checkpoint_ends_every_command_that_needs_it(
    tmp_path: Path, data: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs/run"
    shutil.copytree(finished, run)
    best = small.read(run, "summary.json")["best_checkpoint"]
    flip(next((run / "checkpoints" / best).glob("whole-*")), -3)
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path / "runs", "alignrec", train={"epochs": 4})
    for command in (["evaluate", str(run)], ["train", config]):
        assert main(command) == 2
        (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("distrec")]
        assert best in told
        assert "whole-00000.safetensors" in told


def plant_values(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Replace the validation metric of each epoch that training compares."""
    compare = Trainer._compare
    monkeypatch.setattr(Trainer, "_compare", lambda self, value, epoch: compare(self, values[epoch], epoch))


@pytest.mark.parametrize("values", [[0.5, 0.4, 0.6], [0.5, 0.6, 0.7], [0.7, 0.6, 0.5], [0.4, 0.6, 0.5]])
def test_the_checkpoint_before_a_damaged_one_has_all_it_needs(
    tmp_path: Path, data: str, values: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its best epoch too, which the newest one may have replaced."""
    plant_values(monkeypatch, [*values, 0.1])
    config, run = small.write_config(tmp_path / "run.yaml", data, tmp_path), tmp_path / "run"
    assert main(["train", config]) == 0
    flip(tensor_file(run / "checkpoints" / small.checkpoints(run)[-1]), -1)
    with small.crash_at() as trained:
        assert main(["train", config, "train.epochs=4"]) == 0
    assert trained[0] == (2, 0)
    assert small.read(run, "summary.json")["best_epoch"] == 1 + values.index(max(values))


@pytest.mark.parametrize("damage", ["bit flipped", "tensor file missing", "a folder in its place"])
def test_where_every_checkpoint_is_damaged_none_is_deleted(
    tmp_path: Path, data: str, finished: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs/run"
    shutil.copytree(finished, run)
    for name in small.checkpoints(run):
        file = tensor_file(run / "checkpoints" / name)
        if damage == "a folder in its place":
            file.unlink()
            file.mkdir()
        else:
            TEARS[damage](run / "checkpoints" / name)
    before = small.checkpoints(run)
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path / "runs", "alignrec", train={"epochs": 4})
    assert main(["train", config]) == 2
    assert f"every checkpoint in '{run}/checkpoints' is damaged (the newest, '{before[-1]}'" in capsys.readouterr().err
    assert small.checkpoints(run) == before


def test_a_checkpoint_that_cannot_be_read_now_is_neither_skipped_nor_deleted(
    tmp_path: Path, data: str, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs/run"
    shutil.copytree(finished, run)
    before = small.checkpoints(run)
    read, newest = Folder.size, small.checkpoints(run)[-1]

    def failing(folder: Folder, *parts: str) -> int:
        with folder.reading(*parts):
            if newest in folder.path:
                raise OSError(errno.EIO, "Input/output error")
        return read(folder, *parts)

    monkeypatch.setattr(Folder, "size", failing)
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path / "runs", "alignrec", train={"epochs": 4})
    assert main(["train", config]) == 2
    assert small.checkpoints(run) == before


def test_a_run_whose_checkpoints_are_gone_is_not_trained_again_in_silence(
    tmp_path: Path, data: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs/run"
    shutil.copytree(finished, run)
    metrics = (run / "metrics.jsonl").read_text()
    shutil.rmtree(run / "checkpoints")
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path / "runs", "alignrec", train={"epochs": 4})
    assert main(["train", config]) == 2
    assert "has trained 3 epochs but its checkpoints are gone" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_text() == metrics


def test_a_checkpoint_under_another_name_is_refused(
    tmp_path: Path, data: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs/run"
    shutil.copytree(finished, run)
    newest = run / "checkpoints" / small.checkpoints(run)[-1]
    newest.rename(newest.with_name("epoch-000002-step-000000005"))
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path / "runs", "alignrec", train={"epochs": 4})
    for name in small.checkpoints(run)[:-1]:
        if name > "epoch-000002-step-000000005":
            shutil.rmtree(run / "checkpoints" / name)
    assert main(["train", config]) == 2
    assert "is of another epoch or step than its name says" in capsys.readouterr().err


class Planted:
    """Its unpickling writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_planted_pickle_does_nothing(
    tmp_path: Path, data: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the names that PyTorch's checkpoints, Ray Tune and others would unpickle, and in our own files."""
    run, proof = tmp_path / "runs/run", tmp_path / "proof"
    shutil.copytree(finished, run)
    payload = pickle.dumps(Planted(proof))
    pickle.loads(payload)
    assert proof.exists()  # the trap works
    proof.unlink()
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path / "runs", "alignrec", train={"epochs": 4})
    commands = [["evaluate", str(run)], ["train", config]]
    for name in small.checkpoints(run):
        (run / "checkpoints" / name / ".metadata").write_bytes(payload)
    for command in commands:
        assert main(command) == 2
        assert "older format with pickled metadata" in capsys.readouterr().err
    for name in small.checkpoints(run):
        (run / "checkpoints" / name / ".metadata").unlink()
        for path in (run / "checkpoints" / name).iterdir():
            path.write_bytes(payload)
    for path in ("tuner.pkl", "ray/tuner.pkl", "checkpoints/junk", "checkpoints/.metadata", "evaluation/test.json"):
        (run / path).parent.mkdir(parents=True, exist_ok=True)
        (run / path).write_bytes(payload)
    assert main(commands[0]) == 2
    assert main(commands[1]) == 0  # no checkpoint is left, so training starts over
    assert (run / "checkpoints/junk").read_bytes() == payload  # a foreign file is left alone
    assert not proof.exists()
