"""Input that `distrec train` and `distrec evaluate` refuse before any worker starts, and their exit statuses."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import distrec
from distrec.cli import main
from distrec.config import load_run
from distrec.data.dataset import Dataset, write_part
from distrec.data.manifest import write_manifest
from distrec.errors import InputError
from distrec.methods.registry import resolve
from distrec.training import launch
from distrec.training.hold import holders
from distrec.training.launch import check_inputs
from distrec.training.run_folder import RunFolder
from tests.training import small


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small.write_small(tmp_path_factory.mktemp("data"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must end with status 2 and one sentence; returns the sentence."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        told = capsys.readouterr()
        (line,) = told.err.splitlines()
        assert line.startswith(f"distrec {arguments[0]}: ")
        assert line.endswith((".", ")"))
        return line.partition(": ")[2]

    return run


@pytest.mark.parametrize(
    ("method", "sections", "noted"),
    [
        ("sasrec", {}, True),
        ("sasrec", {"method": {"dropout": 0.0}}, False),
        ("sasrec", {"method": {"dropout": 0.0}, "changes": [{"epoch": 1, "values": {"method.dropout": 0.1}}]}, True),
        ("bivrec", {}, True),
        ("odmt", {}, True),
        ("odmt", {"method": {"dropout": 0.0}}, False),
        ("mentor", {}, False),  # drawn by row, at any number of workers
        ("lightgcn", {}, False),
    ],
)
def test_dropout_that_depends_on_the_number_of_workers_is_a_named_degradation(
    tmp_path: Path, data: str, method: str, sections: dict[str, Any], noted: bool
) -> None:
    *_, told = check_inputs(
        resolve(load_run(small.write_config(tmp_path / "run.yaml", data, tmp_path, method, **sections)))
    )
    assert any("dropout of its own: results depend on the number of workers" in line for line in told) == noted


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.epoch=3", ["unknown key 'train.epoch'", "'epochs'"]),
        ("trian.epochs=3", ["unknown key 'trian'", "'train'"]),
        ("method.name=lightgnc", ["'method.name'", "'lightgnc'", "'lightgcn'"]),
        ("method.layer=3", ["unknown key 'method.layer'", "'layers'"]),
        ("method.layers=two", ["'method.layers'", "'two'", "integer"]),
        ("method.layers=-1", ["'method.layers'", "-1", "greater than or equal to 0"]),
        ("train.epochs=2.5", ["'train.epochs'", "2.5", "integer"]),
        ("train.epochs=yes", ["'train.epochs'", "'yes'", "integer"]),
        ("train.cpus_per_worker=0", ["'train.cpus_per_worker'", "greater than 0"]),
        ("optimizer.lr='1e-3'", ["'optimizer.lr'", "'1e-3'", "number"]),
        ("optimizer.name=lion", ["'optimizer.name'", "'lion'", "'adam'"]),
        ("optimizer.betas=[0.9, 1.0]", ["'optimizer.betas'", "[0, 1)"]),
        ("dense.zero_stage=4", ["'dense.zero_stage'", "4"]),
        ("evaluate.mask=all", ["'evaluate.mask'", "'all'", "'train+valid'"]),
        ("evaluate.ks=[20, 10]", ["'evaluate.ks'", "ascending"]),
        ("train.metric=recall", ["'train.metric'", "'recall'", "recall@20"]),
        ("train.metric=ndcg@7", ["'train.metric'", "'ndcg@7'", "'evaluate.ks'", "add 7"]),
        ("run.name=a/b", ["'run.name'", "'a/b'", "letters"]),
        ("train.epochs", ["'train.epochs'", "key=value"]),
        ("train.epochs.of=3", ["'train.epochs.of=3'", "not a section"]),
        ("train.epochs=[", ["'train.epochs=['", "quote"]),
        ("train.global_batch=0", ["'train.global_batch'", "greater than or equal to 1"]),
        ("optimizer.tables=sparse", ["'optimizer.tables'", "lightgcn", "bprmf"]),
    ],
)
def test_a_wrong_setting_is_named(
    tmp_path: Path, data: str, refused: Callable[..., str], override: str, told: list[str]
) -> None:
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path / "runs")
    message = refused("train", config, override)
    assert [part for part in told if part not in message] == []
    assert not (tmp_path / "runs").exists()


def test_a_wrong_config_file_is_named(tmp_path: Path, data: str, refused: Callable[..., str]) -> None:
    assert "nowhere.yaml" in refused("train", str(tmp_path / "nowhere.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: {epochs: 3\nrun: x\n")
    assert "line 2" in refused("train", str(broken))
    broken.write_text("run: {name: r}\nmethod: {name: lightgcn}\n")
    assert refused("train", str(broken)) == "key 'data' is missing; add it."
    broken.write_text("data: x\nrun: {name: r}\nmethod: {dim: 3}\n")
    assert "'method.name' is missing" in refused("train", str(broken))
    broken.write_text("data: x\ndata: y\n")
    assert "'data' appears twice (line 2)" in refused("train", str(broken))


def rewritten(data: str, folder: Path, split: str, pairs: list[tuple[int, int]]) -> str:
    """A copy of the dataset whose `split` holds `pairs`, with updated checksums."""
    shutil.copytree(data, folder)
    dataset = Dataset.open(str(folder))
    user, item = np.array(pairs, np.int32).reshape(-1, 2).T
    name = f"interactions/{split}/part-00000.parquet"
    table = pa.table({"user": user, "item": item, "timestamp": np.zeros(len(user), np.int64)})
    files = {**dataset.manifest.files, name: write_part(dataset.folder, name, table)}
    counts = {**dataset.manifest.interactions, split: len(pairs)}
    write_manifest(dataset.folder, dataset.manifest.model_copy(update={"files": files, "interactions": counts}))
    return str(folder)


def damaged(data: str, folder: Path, damage: Callable[[Path], Any]) -> str:
    shutil.copytree(data, folder)
    damage(folder)
    return str(folder)


def flip(path: Path) -> None:
    """Change one byte near the start of a file."""
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)


TRAIN, VALID, TEST = (f"interactions/{split}/part-00000.parquet" for split in ("train", "valid", "test"))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (shutil.rmtree, ["no manifest.json", "nothing is there", "distrec prepare"]),
        (lambda f: (f / "manifest.json").unlink(), ["no manifest.json", "'features'", "distrec prepare"]),
        (lambda f: (f / "manifest.json").write_text("{"), ["manifest.json", "not valid JSON"]),
        (lambda f: (f / "manifest.json").write_text('{"format": 9}'), ["format is 9", "reads 1"]),
        (lambda f: flip(f / TRAIN), [TRAIN, "checksum"]),
        (lambda f: flip(f / VALID), [VALID, "checksum"]),
        (lambda f: flip(f / TEST), [TEST, "checksum"]),
        (lambda f: os.truncate(f / TRAIN, 100), [TRAIN, "100 bytes"]),
        (lambda f: (f / VALID).unlink(), [VALID, "missing"]),
    ],
)  # fmt: skip
def test_damaged_data_is_refused(
    tmp_path: Path, data: str, refused: Callable[..., str], damage: Callable[[Path], Any], told: list[str]
) -> None:
    path = damaged(data, tmp_path / "data", damage)
    message = refused("train", small.write_config(tmp_path / "run.yaml", path, tmp_path / "runs"))
    assert [part for part in [path, *told] if part not in message] == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("part", ["text", "image"])
@pytest.mark.parametrize("damage", [Path.unlink, flip, lambda path: os.truncate(path, 200)])
def test_damaged_features_are_refused(
    tmp_path: Path, data: str, refused: Callable[..., str], part: str, damage: Callable[[Path], Any]
) -> None:
    name = f"features/{part}/part-00000.parquet"
    path = damaged(data, tmp_path / "data", lambda folder: damage(folder / name))
    message = refused("train", small.write_config(tmp_path / "run.yaml", path, tmp_path / "runs", "alignrec"))
    assert name in message
    other = main(["train", small.write_config(tmp_path / "other.yaml", path, tmp_path / "runs")])
    assert other == (0 if damage is flip else 2)  # checksums are those of the features that the method reads


@pytest.mark.parametrize(
    ("split", "pairs", "told"),
    [
        ("train", [], ["no train rows"]),
        ("valid", [], ["no valid rows"]),
        ("test", [], ["no test rows"]),
        (
            "train",
            [(0, 1), (0, small.ITEMS)],
            [f"{TRAIN}' row 1", f"item {small.ITEMS}", f"counts {small.ITEMS} items"],
        ),
        ("valid", [(0, 1), (small.USERS, 1)], [f"{VALID}' row 1", f"user {small.USERS}"]),
        ("train", [(0, -1)], [f"{TRAIN}' row 0", "item -1"]),
        ("train", [(4, item) for item in range(small.ITEMS)], ["user 4", "no negative"]),
    ],
)
def test_unusable_splits_are_refused(
    tmp_path: Path, data: str, refused: Callable[..., str], split: str, pairs: list[tuple[int, int]], told: list[str]
) -> None:
    path = rewritten(data, tmp_path / "data", split, pairs)
    message = refused("train", small.write_config(tmp_path / "run.yaml", path, tmp_path / "runs"))
    assert [part for part in told if part not in message] == []


def test_an_unread_test_split_may_be_empty(tmp_path: Path, data: str) -> None:
    path = rewritten(data, tmp_path / "data", "test", [])
    config = small.write_config(tmp_path / "run.yaml", path, tmp_path / "runs", evaluate={"test": False})
    assert main(["train", config]) == 0
    assert "test" not in small.read(tmp_path / "runs/run", "summary.json")


@pytest.mark.parametrize(
    ("features", "told"),
    [(["txet"], ["no feature 'txet'", "'text'"]), ([], ["'method.features'", "empty"])],
)
def test_features_that_the_dataset_lacks_are_refused(
    tmp_path: Path, data: str, refused: Callable[..., str], features: list[str], told: list[str]
) -> None:
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path / "runs", "alignrec")
    message = refused("train", config, f"method.features={features}")
    assert [part for part in told if part not in message] == []


def test_a_batch_smaller_than_the_workers_is_refused(tmp_path: Path, data: str, refused: Callable[..., str]) -> None:
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path / "runs")
    message = refused("train", config, "train.workers=3", "train.global_batch=2")
    assert "'train.global_batch' is 2" in message
    assert "3 workers" in message


def test_a_storage_that_can_not_be_written_is_refused(tmp_path: Path, data: str, refused: Callable[..., str]) -> None:
    (tmp_path / "file").touch()
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path / "file/runs")
    message = refused("train", config)
    assert "'run.storage'" in message
    assert str(tmp_path / "file/runs") in message


def test_a_bucket_that_does_not_exist_is_refused(
    tmp_path: Path, data: str, s3: str, refused: Callable[..., str]
) -> None:
    config = small.write_config(tmp_path / "run.yaml", data, f"{s3}-absent")
    assert "'run.storage'" in refused("train", config)
    config = small.write_config(tmp_path / "run.yaml", f"{s3}/nothing", tmp_path / "runs")
    assert "nothing is there" in refused("train", config)


@pytest.mark.parametrize("place", ["data", "run.storage"])
def test_an_object_store_without_credentials_is_refused(
    tmp_path: Path, data: str, place: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from distrec.data.s3 import S3

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    S3.clear_instance_cache()
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path / "runs")
    message = refused("train", config, f"{place}=s3://bucket/folder")
    assert "s3://bucket/folder" in message
    assert "credentials" in message
    S3.clear_instance_cache()


def test_evaluate_refuses_what_is_no_finished_run(tmp_path: Path, data: str, refused: Callable[..., str]) -> None:
    assert "no config.yaml" in refused("evaluate", str(tmp_path / "runs/run"))
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path / "runs", optimizer={"name": "sgd", "lr": 1e30})
    assert main(["train", config]) == 3
    assert "not finished" in refused("evaluate", str(tmp_path / "runs/run"))


def test_evaluate_refuses_another_dataset(tmp_path: Path, data: str, refused: Callable[..., str]) -> None:
    copy = shutil.copytree(data, tmp_path / "data")
    config = small.write_config(tmp_path / "run.yaml", str(copy), tmp_path / "runs")
    assert main(["train", config]) == 0
    shutil.rmtree(copy)
    assert "no manifest.json" in refused("evaluate", str(tmp_path / "runs/run"))
    small.write_small(copy, seed=1)
    message = refused("evaluate", str(tmp_path / "runs/run"))
    assert "another dataset" in message
    assert str(copy) in message


def test_train_from_python_and_from_a_config_object(tmp_path: Path, data: str) -> None:
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path / "runs")
    first = distrec.train(config, ["run.name=a"])
    second = distrec.train(load_run(config, ["run.name=b"]))
    assert first["test"] == second["test"]
    assert set(first["test"]) == {
        f"{name}@{k}" for name in ("recall", "ndcg", "precision", "map", "hit") for k in (5, 10, 20, 50)
    }
    with pytest.raises(InputError, match=r"unknown key 'train.epoch'"):
        distrec.train(config, ["train.epoch=3"])


def test_paths_are_those_of_the_working_folder(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(data).parent)
    config = small.write_config(tmp_path / "run.yaml", Path(data).name, os.path.relpath(tmp_path / "runs"))
    assert main(["train", config]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "runs/run", "--split", "valid"]) == 0
    report = small.read(tmp_path / "runs/run", "evaluation/valid.json")
    assert "recall@20" in capsys.readouterr().out
    assert report


def test_no_file_is_checked_twice_before_the_workers_start(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, done = small.write_config(tmp_path / "run.yaml", data, tmp_path, "stair", train={"epochs": 1}), Counter()

    def count(owner: Any, name: str, what: Callable[..., str]) -> None:
        original = getattr(owner, name)

        def counted(*given: Any, **options: Any) -> Any:
            done[what(*given)] += 1
            return original(*given, **options)

        monkeypatch.setattr(owner, name, counted)

    count(Dataset, "defect", lambda *_: "footers")
    count(launch, "damaged_file", lambda *_: "checksums of features")
    count(Dataset, "read_table", lambda _, name, *rest: name)
    monkeypatch.setattr(launch, "_run_here", lambda *_: None)  # no worker
    monkeypatch.setattr(RunFolder, "summary", lambda _: {})
    launch.train(config)
    splits = {f"interactions/{split}/part-00000.parquet": 1 for split in ("train", "valid", "test")}
    assert done == {"footers": 1, "checksums of features": 1, **splits}
    done.clear()
    launch.train(config, held=True)  # a sweep's trial, whose driver has checked the same files
    assert done == splits


def test_how_a_run_ended_is_read_while_it_is_held(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later attempt may write to the same files as soon as the hold ends."""
    read: list[list[str]] = []
    monkeypatch.setattr(launch, "_run_here", lambda *_: None)
    monkeypatch.setattr(RunFolder, "note_outcome", lambda run, error: read.append(holders(run.folder)))
    monkeypatch.setattr(RunFolder, "summary", lambda run: read.append(holders(run.folder)))
    launch.train(small.write_config(tmp_path / "run.yaml", data, tmp_path))
    assert read == [["holder-000001.json"]] * 2
