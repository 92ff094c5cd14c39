"""Methods that read histories refuse data whose histories would hold rows from after the held-out ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from distrec.cli import main
from distrec.config import load_run
from distrec.data.dataset import Dataset, Interactions, write_part
from distrec.data.manifest import SPLITS, write_manifest
from distrec.methods.registry import METHODS, resolve
from distrec.training.launch import check_inputs
from tests.training import small

READERS = [name for name, kind in METHODS.items() if kind.reads_histories]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small.write_small(tmp_path_factory.mktemp("data"))


def retimed(data: str, folder: Path, change: Callable[[str, Interactions], np.ndarray], rule: str = "given") -> str:
    """A copy of the dataset with the times that `change` gives each split, as if rule `rule` had split it."""
    shutil.copytree(data, folder)
    dataset = Dataset.open(str(folder))
    files = dict(dataset.manifest.files)
    for split in SPLITS:
        rows = dataset.interactions(split)
        table = pa.table({"user": rows.user, "item": rows.item, "timestamp": change(split, rows)})
        name = f"interactions/{split}/part-00000.parquet"
        files[name] = write_part(dataset.folder, name, table)
    write_manifest(dataset.folder, dataset.manifest.model_copy(update={"files": files, "split": rule}))
    return str(folder)


def refused(config: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence of `distrec train`, which must end with status 2."""
    capsys.readouterr()
    assert main(["train", config]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_methods_that_read_histories() -> None:
    assert {"odmt", "bivrec", "sasrec"} <= set(READERS)


@pytest.mark.parametrize("method", READERS)
@pytest.mark.parametrize(("late", "user", "newest_in"), [("valid", 5, "train"), ("test", 7, "valid")])
def test_a_held_out_row_that_is_older_than_its_history_is_refused(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str], method: str, late: str, user: int, newest_in: str
) -> None:
    known = Dataset.open(data).interactions(newest_in)  # type: ignore[arg-type]
    newest = int(known.timestamp[known.user == user].max())
    item = int(Dataset.open(data).interactions(late).item[user])  # type: ignore[arg-type]

    def at(time: int) -> Callable[[str, Interactions], np.ndarray]:
        return lambda split, rows: np.where((split == late) & (rows.user == user), time, rows.timestamp)

    def config(path: str, name: str = method) -> str:
        return small.write_config(tmp_path / "run.yaml", path, tmp_path / "runs", name, evaluate={"test": False})

    path = retimed(data, tmp_path / "late", at(newest - 1))
    message = refused(config(path), capsys)
    assert message.startswith(
        f"distrec train: data '{path}': 1 of 122 held-out rows are older than the newest known row of their user "
        f"(first: user u{user}, item i{item} in {late} at time {newest - 1}, newest known row at {newest}), "
        f"but {method}"
    )
    assert message.endswith(
        " reads histories, which would then hold rows from the future; prepare the data with 'split.name' "
        "leave_last_out, per_user_time or by_user, or use a method that reads no histories."
    )
    assert not (tmp_path / "runs").exists()
    check_inputs(resolve(load_run(config(path, "lightgcn"))))
    check_inputs(resolve(load_run(config(retimed(data, tmp_path / "equal", at(newest))))))


def test_without_times_labels_are_trusted_and_a_drawn_split_is_refused(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(split: str, rows: Interactions) -> np.ndarray:
        return rows.timestamp * 0

    path = retimed(data, tmp_path / "given", never)
    check_inputs(resolve(load_run(small.write_config(tmp_path / "run.yaml", path, tmp_path / "runs", "sasrec"))))
    path = retimed(data, tmp_path / "drawn", never, "per_user_random")
    message = refused(small.write_config(tmp_path / "run.yaml", path, tmp_path / "runs", "sasrec"), capsys)
    assert "split 'per_user_random' drew 122 of 122 held-out rows among equal times, but sasrec reads" in message
