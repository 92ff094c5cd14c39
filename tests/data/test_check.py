"""`distrec check` on datasets with one defect each, whose checksums have been updated so that they still match."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distrec.data.check import check
from distrec.data.dataset import Dataset
from distrec.data.histories import among_equal_times, backward
from distrec.data.manifest import COLD
from distrec.evaluation import slices
from tests.data.damage import edit, edit_manifest, refuse, with_value
from tests.data.raw import SOURCE, interactions, prepared, write


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A prepared dataset with features and content."""
    columns = interactions(seed=1)
    items = np.unique(columns["i"])
    write(tmp_path / "raw/interactions.parquet", columns)
    words = [None if row < 15 else f"item {i}" for row, i in enumerate(items)]
    write(tmp_path / "raw/items.parquet", {"i": items, "words": words})
    values = np.random.default_rng(0).normal(size=(len(items), 4)).astype(np.float32)
    values[4] = values[9]
    values[1] = 0
    np.save(tmp_path / "raw/f.npy", values)
    importer = {
        "interactions": {"files": "interactions.parquet", **SOURCE},
        "items": {"files": "items.parquet", "id": "i", "text": "{words}"},
        "features": {"f": {"files": "f.npy", "zeros_are_missing": True}},
    }
    prepared(tmp_path, importer)
    return tmp_path / "out"


def test_a_whole_dataset_and_its_oddities(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(str(out))
    report = capsys.readouterr().out
    assert "no defect found" in report
    assert "feature 'f': 1 items have the same vector as an earlier item" in report
    assert "content 'text': only 10 of 25 items (40.0%) have it" in report
    assert "f: 4 x float32, 24 of 25 items (96.0%), from f.npy" in report
    rows = np.bincount(Dataset.open(str(out)).interactions("train").item, minlength=25)
    cold, unseen = int((rows <= 5).sum()), int((rows == 0).sum())
    assert f"cold items    {cold:,} with at most 5 train rows, of which {unseen} have none" in report


def test_cold_is_the_same_in_check_as_in_the_slices_of_an_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Items with 4, 5 and 6 training rows: two are cold, for both."""
    rows = [(user, item, "train") for item, count in enumerate((4, 5, 6)) for user in range(count)]
    rows += [(user, item, split) for item, split in ((3, "valid"), (4, "test")) for user in range(4)]
    columns = dict(zip(("user", "item", "split"), map(list, zip(*rows)), strict=True))
    write(tmp_path / "raw/log.csv", columns)
    prepared(tmp_path, {"interactions": {"files": "log.csv", "split": "split"}}, split={"name": "given"})
    capsys.readouterr()
    check(str(tmp_path / "out"))
    assert "cold items    4 with at most 5 train rows, of which 2 have none" in capsys.readouterr().out
    assert slices.COLD == COLD == 5


@pytest.mark.parametrize(("rule", "by"), [("leave_last_out", "by the order of the source"),
                                          ("per_user_random", "at random"), ("given", "by their labels")])  # fmt: skip
def test_time_order_and_equal_times_are_told(
    tmp_path: Path, rule: str, by: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """User a has three days, user b one; in the given split, the first day of a is in valid."""
    columns = {
        "user": list("aaaaabbb"), "item": list("pqrstpqr"), "time": [1, 2, 3, 3, 3, 9, 9, 9],
        "split": ["valid", "train", "train", "train", "test", "train", "valid", "test"],
    }  # fmt: skip
    write(tmp_path / "raw/log.csv", columns)
    importer = {"interactions": {"files": "log.csv", "timestamp": "time", "split": "split"}}
    dataset = prepared(tmp_path, importer, split={"name": rule})
    told, (older, tied) = capsys.readouterr().out, {"leave_last_out": (0, 4), "given": (1, 3)}.get(rule, (None, None))
    if older is None:
        splits = {name: dataset.interactions(name) for name in ("train", "valid", "test")}
        older, tied = backward(splits, 2).older, among_equal_times(splits)
    line = f"{tied} of 4 held-out rows were chosen among equal times, {by}"
    assert f"  times     {line}\n" in told
    check(str(tmp_path / "out"))
    told = capsys.readouterr().out
    assert f"  time order    {older} of 4 held-out rows are older than the newest known row of their user\n" in told
    assert f"  equal times   {line}\n" in told
    assert "all rows have the same time" not in told


def test_without_times_check_says_what_orders_histories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "raw/log.csv", {"user": [1, 1, 1], "item": [4, 5, 6], "split": ["train", "valid", "test"]})
    prepared(tmp_path, {"interactions": {"files": "log.csv", "split": "split"}}, split={"name": "given"})
    assert "chosen among equal times" not in capsys.readouterr().out
    check(str(tmp_path / "out"))
    told = capsys.readouterr().out
    assert "time order    0 of 2" in told
    assert "equal times   2 of 2" in told
    assert "warning       all rows have the same time, so histories are in the order of the source within each" in told


def test_nothing_there(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "has no manifest.json .nothing is there")


TRAIN, VALID = "interactions/train/part-00000.parquet", "interactions/valid/part-00000.parquet"


def test_files(out: Path) -> None:
    whole = (out / TRAIN).read_bytes()
    (out / TRAIN).write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    refuse(out, f"checksum of '{TRAIN}' differs from manifest.json")
    (out / TRAIN).unlink()
    refuse(out, f"'{TRAIN}' is listed in manifest.json but missing")
    edit_manifest(out, lambda tree: tree["files"].pop("users.parquet") and tree["files"].pop(TRAIN))
    refuse(out, "does not list 'users.parquet'")
    (out / "manifest.json").write_text("{")
    refuse(out, "manifest.json is not valid JSON")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (TRAIN, with_value("item", 3, 25), r"train/part-00000\.parquet' row 3 has item 25 but manifest.json"),
        (TRAIN, with_value("user", 0, -1), r"train/part-00000\.parquet' row 0 has user -1"),
        (TRAIN, lambda t: t.slice(1), r"counts \d+ rows of 'train' but lists files with \d+ rows"),
        (TRAIN, lambda t: t.slice(0, 0), "rows of 'train' but lists files with 0 rows"),
        (TRAIN, lambda t: t.take(list(range(len(t)))[::-1]), r"part-00000\.parquet' row 1 is out of order"),
        (TRAIN, lambda t: t.set_column(1, "item", t["item"].cast("int64")), "'item' is int64, must be int32"),
        (TRAIN, lambda t: t.drop(["timestamp"]), "column 'timestamp' is absent, must be int64"),
        ("users.parquet", with_value("original", 3, "5"), "'users.parquet' has 39 distinct ids for 40 users"),
        ("items.parquet", with_value("index", 3, 4), "'items.parquet' column 'index' is not 0 to 24 in order"),
        ("items.parquet", lambda t: t.drop(["title"]), "column 'title' is absent, must be string"),
        ("features/f/part-00000.parquet", with_value("vector", 7, [0, 1, float("inf"), 0]), "item 7: feature 2 is inf"),
        ("features/f/part-00000.parquet", with_value("item", 7, 8), "column 'item' is not 0 to 24 in order"),
        (
            "features/f/part-00000.parquet", with_value("missing", 7, True),
            "feature 'f' has 2 missing items but manifest.json says 1",
        ),
        ("features/f/part-00000.parquet", lambda t: t.slice(0, 20), "counts 25 items but lists parts with 20 rows"),
        ("content/part-00000.parquet", with_value("text", 20, None), "content has {'text': 9"),
        ("content/part-00000.parquet", with_value("item", 20, 0), "column 'item' is not 0 to 24 in order"),
    ],
)  # fmt: skip
def test_content_that_contradicts_the_manifest(out: Path, name: str, change: Any, message: str) -> None:
    edit(out, name, change)
    refuse(out, message)


def test_leaks_and_repetitions(out: Path) -> None:
    train, valid = pq.read_table(out / TRAIN), pq.read_table(out / VALID)
    user, item = train["user"][0].as_py(), train["item"][0].as_py()
    assert valid["user"][0].as_py() == user
    edit(out, VALID, with_value("item", 0, item))
    refuse(out, rf"user {user} with item {item} is in 'train' and in 'valid' \(1 such pairs leak\)")
    edit(out, VALID, lambda _: valid)
    check(str(out))
    edit(out, TRAIN, with_value("item", 1, item))
    refuse(out, f"user {user} with item {item} occurs twice in 'train'")


def test_a_user_without_train_rows(out: Path) -> None:
    train = pq.read_table(out / TRAIN)
    others = train.filter(pa.compute.not_equal(train["user"], 6))
    edit(out, TRAIN, lambda _: others)
    edit_manifest(out, lambda tree: tree["interactions"].update(train=others.num_rows))
    refuse(out, "user 6 is in 'valid' but not in train")


def test_context_that_leaks_and_held_out_users_without_it(tmp_path: Path) -> None:
    write(tmp_path / "raw/interactions.parquet", interactions(seed=2))
    prepared(tmp_path, split={"name": "by_user"})
    out = tmp_path / "out"
    context, valid = (f"interactions/{name}/part-00000.parquet" for name in ("context", "valid"))
    rows = pq.read_table(out / context)
    user = pq.read_table(out / valid)["user"][0].as_py()
    item = rows.filter(pa.compute.equal(rows["user"], user))["item"][0].as_py()
    whole = pq.read_table(out / valid)
    edit(out, valid, with_value("item", 0, item))
    refuse(out, rf"user {user} with item {item} is in 'context' and in 'valid' \(1 such pairs leak\)")
    edit(out, valid, lambda _: whole)
    others = rows.filter(pa.compute.not_equal(rows["user"], user))
    edit(out, context, lambda _: others)
    edit_manifest(out, lambda tree: tree["interactions"].update(context=others.num_rows))
    refuse(out, f"user {user} is in 'valid' but not in train")


def test_widths_and_types_of_features(out: Path) -> None:
    edit_manifest(out, lambda tree: tree["features"]["f"].update(width=5))
    refuse(out, r"column 'vector' is fixed_size_list.*\[4\], must be fixed_size_list.*\[5\]")
    edit_manifest(out, lambda tree: tree["features"]["f"].update(width=4, dtype="float16"))
    refuse(out, "column 'vector' is .*float.*, must be .*halffloat")
