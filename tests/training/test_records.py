"""Runs whose files are damaged, foreign or of another kind: one sentence and exit 2, or repaired and said so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distrec.cli import main
from distrec.data.storage import open_folder
from distrec.errors import BAD_INPUT, DONE, FAILED, InputError
from distrec.training.hold import Hold
from distrec.training.run_folder import RunFolder
from tests.training import small


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small.write_small(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """A finished run of two epochs; its config is beside it."""
    home = tmp_path_factory.mktemp("trained")
    assert main(["train", small.write_config(home / "run.yaml", data, home, train={"epochs": 2})]) == DONE
    return home / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def train(trained: Path, tmp_path: Path) -> Callable[..., int]:
    """Trains the copy; returns the exit status."""
    return lambda *more: main(["train", str(trained.parent / "run.yaml"), f"run.storage={tmp_path}", *more])


JUNK = [b"", b" \n", b"{", b"[]", b"3", b"null", b'"text"', b"{}", b"\xff\xfe\0{", b"[" * 100_000, b"9" * 5_000]
CHANGES: dict[str, list[tuple[str, Any]]] = {
    "run.json": [("identity", []), ("identity", {}), ("identity", {"data": 3}), ("attempts", {}), ("attempts", [1]),
                 ("changes", 7), ("changes", [{"epoch": "1"}])],
    "summary.json": [("best_checkpoint", 3), ("best_checkpoint", "../../other"), ("valid", [1]),
                     ("valid", {"recall@20": "high"}), ("epochs", None)],
    "progress.json": [("epoch", "2"), ("loss", 3), ("replayed", None)],
    "metrics.jsonl": [("epoch", "1"), ("epoch", 4), ("loss", [3]), ("seconds", 3), ("valid", None)],
}  # fmt: skip


def damages(name: str, path: Path) -> list[bytes]:
    """Damaged contents of a run's file: junk, a part of it, and values of other types under its keys."""
    whole = path.read_bytes()
    first = json.loads(whole.splitlines()[0] if name == "metrics.jsonl" else whole)
    changed = [json.dumps({**first, key: value}).encode() for key, value in CHANGES[name]]
    without = [json.dumps({key: value for key, value in first.items() if key != CHANGES[name][0][0]}).encode()]
    parts = [whole.rstrip()[: -len(whole.rstrip()) // 3]]
    return [*(junk for junk in JUNK if junk.strip() or name != "metrics.jsonl"), *changed, *without, *parts]


def told(capsys: pytest.CaptureFixture[str], verb: str = "train") -> str:
    """The one line that a refused verb printed as its error."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"distrec {verb}: ")
    return line


def test_a_damaged_run_record_is_refused(run: Path, train: Callable[..., int], capsys: Any) -> None:
    folder = RunFolder(open_folder(str(run)))
    for content in damages("run.json", run / "run.json"):
        (run / "run.json").write_bytes(content)
        with pytest.raises(
            InputError, match=r"run\.json' cannot be used \(.*; restore the file, use another 'run\.name'"
        ):
            print(folder.record, content[:80])
    for verb, command in (("train", train), ("evaluate", lambda: main(["evaluate", str(run)]))):
        assert command() == BAD_INPUT
        assert f"'{run / 'run.json'}' cannot be used (it is not JSON)" in told(capsys, verb)
        assert (run / "run.json").read_bytes() == content


def test_checkpoints_without_a_record_are_refused(run: Path, train: Callable[..., int], capsys: Any) -> None:
    (run / "run.json").unlink()
    assert train() == BAD_INPUT
    assert "holds checkpoints but no run.json" in told(capsys)


@pytest.mark.parametrize("name", ["summary.json", "progress.json", "metrics.jsonl"])
def test_what_training_writes_anew_is_removed_and_named(run: Path, name: str, capsys: Any) -> None:
    folder = RunFolder(open_folder(str(run)))
    for content in damages(name, run / name):
        (run / name).write_bytes(content)
        if name == "summary.json":
            with pytest.raises(InputError, match=r"summary.json' cannot be used \(.*run 'distrec train' with the run"):
                folder.summary()
        else:
            assert not (folder.read_metrics() if name == "metrics.jsonl" else folder.read_progress()), content[:80]
        folder._remove_damaged()
        assert f"'{run / name}' was damaged (" in capsys.readouterr().out, content[:80]
        assert not (run / name).exists()


def test_the_same_command_repairs_a_run(run: Path, train: Callable[..., int], capsys: Any) -> None:
    before = {name: small.read(run, name) for name in ("summary.json",)}
    epochs = [(epoch["epoch"], epoch["loss"]) for epoch in small.metrics(run)]
    for name in ("summary.json", "progress.json", "metrics.jsonl", "config.yaml"):
        (run / name).write_bytes(b"[1, 2")
    for name in ("epoch-x", "epoch-1-step-2", "epoch-000002-step-000000000.bak", ".DS_Store"):
        (run / "checkpoints" / name).write_bytes(b"")
    (run / "checkpoints/epoch-9").mkdir()
    assert main(["evaluate", str(run)]) == BAD_INPUT
    line = told(capsys, "evaluate")
    assert "config.yaml' cannot be used (" in line
    assert line.endswith("; run 'distrec train' with the run's config again, which writes it anew.")
    assert train() == DONE
    printed = capsys.readouterr().out
    assert all(f"'{run / name}' was damaged (" in printed for name in ("summary.json", "progress.json"))
    assert "training ended before, after epoch 2: nothing is trained now" in printed
    for split in ("valid", "test"):
        assert small.read(run, "summary.json")[split] == before["summary.json"][split]
    assert [(epoch["epoch"], epoch["loss"]) for epoch in small.metrics(run)] == epochs
    assert main(["evaluate", str(run)]) == DONE


@pytest.mark.parametrize(
    ("name", "what"),
    [("run.json", "file"), ("summary.json", "file"), ("metrics.jsonl", "file"), ("evaluation/test.json", "file"),
     ("checkpoints", "folder"), ("evaluation", "folder"), ("tensorboard", "folder")],
)  # fmt: skip
def test_a_file_in_the_place_of_a_folder_and_the_reverse_are_refused(
    run: Path, train: Callable[..., int], capsys: Any, name: str, what: str
) -> None:
    path = run / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    if what == "file":
        path.mkdir()
    else:
        path.write_text("")
    for verb, ended in (("train", train()), ("evaluate", main(["evaluate", str(run)]))):
        assert ended == BAD_INPUT, verb
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(f"but a run keeps a {what} there; move it away" in line and str(path) in line for line in lines)


@pytest.mark.parametrize("text", ["", "3", "- a", "data: [", "data: 3\n", "run: {name: x}\n", "\0"])
def test_a_damaged_config_of_a_run_is_refused_by_evaluate(run: Path, capsys: Any, text: str) -> None:
    (run / "config.yaml").write_text(text)
    assert main(["evaluate", str(run)]) == BAD_INPUT
    assert f"'{run / 'config.yaml'}' cannot be used (" in told(capsys, "evaluate")


def test_a_run_that_may_not_be_read_is_refused(
    run: Path, train: Callable[..., int], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests may run as root, which may read everything, so the file system refuses in its name."""
    system = type(open_folder(str(run)).fs)
    read = system.cat_file

    def forbidden(self: Any, path: str, *rest: Any, **options: Any) -> bytes:
        if path.startswith(str(run)):
            raise PermissionError(13, "Permission denied", path)
        return bytes(read(self, path, *rest, **options))

    monkeypatch.setattr(system, "cat_file", forbidden)
    refused = "cannot be read (Permission denied); check the path and its permissions."
    assert main(["evaluate", str(run)]) == BAD_INPUT
    assert f"'{run / 'config.yaml'}' {refused}" in told(capsys, "evaluate")
    assert train() == BAD_INPUT
    line = told(capsys)
    assert f"distrec train: '{run}" in line
    assert refused in line


def test_a_run_that_is_being_trained_is_left_alone(run: Path, train: Callable[..., int], capsys: Any) -> None:
    files = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with Hold(open_folder(str(run)), "run", str(run.parent)):
        assert train() == BAD_INPUT
        assert f"run '{run}' is being trained by process" in told(capsys)
        assert main(["evaluate", str(run)]) == BAD_INPUT
        assert f"run '{run}' is being trained by process" in told(capsys, "evaluate")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == files
    assert train() == DONE


def test_an_attempt_that_was_taken_over_writes_no_checkpoint(
    run: Path, train: Callable[..., int], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another attempt opens the run during its third epoch."""
    write_progress = RunFolder.write_progress

    def taken_over(folder: RunFolder, progress: dict[str, Any]) -> None:
        write_progress(folder, progress)
        record = folder.record
        if len(record["attempts"]) == 2:
            folder.update_record(attempts=[*record["attempts"], {"started": "later"}])

    monkeypatch.setattr(RunFolder, "write_progress", taken_over)
    before, summary = small.checkpoints(run), (run / "summary.json").read_bytes()
    assert train("train.epochs=4") == BAD_INPUT
    assert "was taken over by a later attempt" in told(capsys)
    assert small.checkpoints(run) == before
    assert (run / "summary.json").read_bytes() == summary
    assert small.read(run, "run.json")["attempts"][-1] == {"started": "later"}


def test_words_for_where_a_run_goes_on(tmp_path: Path, data: str, capsys: Any) -> None:
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path, train={"checkpoint_every": 4, "epochs": 2})

    def continued(*more: str) -> list[str]:
        capsys.readouterr()
        assert main(["train", config, *more]) == DONE
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("continuing")]

    with small.crash_at((1, 6)):
        assert main(["train", config]) == FAILED
    assert "continuing" not in capsys.readouterr().out
    assert continued() == ["continuing in epoch 2 after step 4 of 9"]
    assert continued("train.epochs=3") == ["continuing after epoch 2 of 3"]
    assert small.read(tmp_path / "run", "run.json")["attempts"][-1]["start"] == {
        "epoch": 2, "epochs": 3, "step": 0, "steps": 9, "ended": False,
    }  # fmt: skip
