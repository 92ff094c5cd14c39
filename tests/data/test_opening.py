"""Opening a prepared dataset whose checksums fit but whose content does not: one sentence that names the file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distrec.cli import main
from distrec.data.dataset import Dataset
from distrec.data.storage import open_folder
from distrec.errors import InputError
from tests.data.damage import edit, edit_manifest, sign, with_value
from tests.data.raw import SOURCE, interactions, prepared, write
from tests.training.random_data import write_tokens
from tests.training.small import write_config

TRAIN, VALID = "interactions/train/part-00000.parquet", "interactions/valid/part-00000.parquet"
FEATURE, CONTENT = "features/f/part-00000.parquet", "content/part-00000.parquet"
TOKENS = "features/t-tokens/part-00000.parquet"
ENCODER = "encoder all-minilm-l6-v2 0123456789abcdef"
Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset of 40 users and 25 items with a feature set, a token set and texts."""
    root = tmp_path_factory.mktemp("whole")
    columns = interactions(seed=1)
    items = np.unique(columns["i"])
    write(root / "raw/interactions.parquet", columns)
    write(root / "raw/items.parquet", {"i": items, "words": [None if row < 15 else "x" for row in range(len(items))]})
    values = np.random.default_rng(0).normal(size=(len(items), 4)).astype(np.float32)
    values[1] = 0
    np.save(root / "raw/f.npy", values)
    importer = {
        "interactions": {"files": "interactions.parquet", **SOURCE},
        "items": {"files": "items.parquet", "id": "i", "text": "{words}"},
        "features": {"f": {"files": "f.npy", "zeros_are_missing": True}},
    }
    prepared(root, importer)
    feature, file = write_tokens(open_folder(str(root / "out")), "t-tokens", len(items), (3, 4), 0)
    edit_manifest(
        root / "out",
        lambda tree: (
            tree["features"].update({"t-tokens": feature.model_dump()}),
            tree["files"].update({TOKENS: file.model_dump()}),
        ),
    )
    return root / "out"


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "data")
    return tmp_path / "data"


def read_everything(path: Path) -> None:
    """Read what any verb reads, as workers do."""
    data = Dataset.open(str(path), checked=True)
    for split in data.manifest.interactions:
        data.interactions(split)  # type: ignore[arg-type]
    for table in (data.users_table(), data.items_table()):
        table["original"].to_pylist()
    for name, entry in data.manifest.features.items():
        (data.token_rows if entry.tokens > 1 else data.feature_rows)(name, 0, data.items)
        data.missing(name)
    for rows in data.content(["text", "image"]):
        rows["text"].to_pylist()
    list(data.content_of([3, 20], ["text"]))


def refused(path: Path, *told: str) -> None:
    with pytest.raises(InputError) as caught:
        Dataset.open(str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert message.endswith(".")
    for part in told:
        assert part in message


def test_a_whole_dataset_opens_and_reads(whole: Path) -> None:
    Dataset.open(str(whole))
    read_everything(whole)


def changed(name: str, change: Callable[[pa.Table], pa.Table]) -> Damage:
    return lambda out: edit(out, name, change)


def cast(column: str, kind: str) -> Callable[[pa.Table], pa.Table]:
    return lambda t: t.set_column(t.column_names.index(column), column, t[column].cast(kind))


def vectors(width: int, kind: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        values = pa.array(np.zeros((len(table), width)).tolist(), pa.list_(kind, width))
        return table.set_column(1, "vector", values)

    return change


def raw(name: str, change: Callable[[bytes], bytes]) -> Damage:
    def damage(out: Path) -> None:
        (out / name).write_bytes(change((out / name).read_bytes()))
        sign(out, name)

    return damage


def halved(out: Path) -> None:
    """A feature with half of its rows, to which the whole manifest agrees."""
    edit(out, FEATURE, lambda t: t.slice(0, 12))


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        (FEATURE, halved, "counts 25 items but lists parts with 12 rows for feature 'f'"),
        (FEATURE, lambda o: (halved(o), sign(o, FEATURE, 25)), "has 12 rows but manifest.json says 25"),
        (TRAIN, changed(TRAIN, cast("item", "float64")), "column 'item' is double, must be int32"),
        (TRAIN, changed(TRAIN, cast("user", "int64")), "column 'user' is int64, must be int32"),
        (TRAIN, changed(TRAIN, lambda t: t.drop(["timestamp"])), "column 'timestamp' is absent"),
        (TRAIN, changed(TRAIN, lambda t: t.append_column("x", t["user"])), "has a column 'x'"),
        (TRAIN, changed(TRAIN, lambda t: t.append_column("item", t["item"])), "two columns of one name"),
        (VALID, changed(VALID, lambda t: t.slice(1)), "counts 41 rows of 'valid' but lists files with 40 rows"),
        (VALID, lambda o: (o / VALID).unlink(), "is listed in manifest.json but missing"),
        (VALID, lambda o: ((o / VALID).unlink(), (o / VALID).mkdir()), "is a folder, not a file"),
        (VALID, lambda o: ((o / VALID).unlink(), (o / VALID).symlink_to(o / VALID)), "Too many levels of symbolic"),
        (VALID, lambda o: ((o / VALID).unlink(), os.mkfifo(o / VALID)), "not a regular file"),
        (VALID, raw(VALID, lambda b: b[:200]), "cannot be read as Parquet"),
        (VALID, raw(VALID, lambda b: b""), "cannot be read as Parquet"),
        (VALID, raw(VALID, lambda b: b"PAR1" + bytes(100) + b"PAR1"), "cannot be read as Parquet"),
        (VALID, lambda o: (o / VALID).write_bytes(b"x"), "has 1 bytes but manifest.json says"),
        ("users.parquet", changed("users.parquet", lambda t: t.slice(1)), "counts 40 users but gives"),
        ("items.parquet", changed("items.parquet", cast("original", "binary")), "'original' is binary, must be string"),
        (FEATURE, changed(FEATURE, vectors(3, pa.float32())), "[3], must be"),
        (FEATURE, changed(FEATURE, vectors(4, pa.float16())), "[4], must be"),
        (FEATURE, lambda o: edit_manifest(o, lambda t: t["features"]["f"].update(width=5)), "[4], must be"),
        (TOKENS, changed(TOKENS, lambda t: t.drop(["count"])), "column 'count' is absent"),
        (CONTENT, changed(CONTENT, cast("text", "binary")), "column 'text' is binary, must be string"),
    ],
)  # fmt: skip
def test_files_that_contradict_the_manifest(out: Path, name: str, damage: Damage, told: str) -> None:
    damage(out)
    shown = name if "manifest.json counts" not in told and not told.startswith("counts") else "manifest.json"
    refused(out, told, shown)


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        (TRAIN, changed(TRAIN, with_value("item", 3, 25)), "row 3 has item 25 but manifest.json counts 25 items"),
        (TRAIN, changed(TRAIN, with_value("user", 3, -2)), "row 3 has user -2 but manifest.json counts 40 users"),
        (TRAIN, changed(TRAIN, with_value("user", 3, None)), "nulls in columns ['user']"),
        ("users.parquet", changed("users.parquet", with_value("index", 3, 40)), "'index' is not 0 to 39 in order"),
        ("items.parquet", changed("items.parquet", with_value("original", 3, None)), "nulls in columns ['original']"),
        ("items.parquet", changed("items.parquet", lambda t: t.take(list(range(24, -1, -1)))), "is not 0 to 24 in ord"),
        (FEATURE, changed(FEATURE, with_value("vector", 3, None)), "nulls in columns ['vector']"),
        (FEATURE, changed(FEATURE, with_value("vector", 3, [0, None, 0, 0])), "a vector is empty"),
        (FEATURE, changed(FEATURE, with_value("missing", 3, None)), "nulls in columns ['missing']"),
        (FEATURE, changed(FEATURE, with_value("item", 0, 1)), "column 'item' is not 0 to 24 in order"),
        (TOKENS, changed(TOKENS, with_value("count", 3, 4)), "item 3: 4 of 3 tokens are real"),
        (TOKENS, changed(TOKENS, with_value("count", 3, -1)), "item 3: -1 of 3 tokens are real"),
        (CONTENT, changed(CONTENT, with_value("item", 20, 0)), "column 'item' is not 0 to 24 in order"),
    ],
)
@pytest.mark.parametrize("statistics", [True, False])
def test_values_that_contradict_the_manifest_are_refused_when_read(
    out: Path, name: str, damage: Damage, told: str, statistics: bool
) -> None:
    damage(out)
    pq.write_table(pq.read_table(out / name), out / name, write_statistics=statistics)
    sign(out, name)
    Dataset.open(str(out))
    with pytest.raises(InputError) as caught:
        read_everything(out)
    assert f"'{name}'" in str(caught.value)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def moved(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    """The file `old` of a manifest, listed as `new`."""

    def change(tree: dict[str, Any]) -> None:
        tree["files"][new] = tree["files"].pop(old)

    return change


def nested(depth: int) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for _ in range(depth):
        tree = {"a": tree}
    return tree


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.update(users=10**12), "key 'manifest.users' is 1000000000000 but must be less than or equal to"),
        (lambda t: t.update(users=1e12), "key 'manifest.users'"),
        (lambda t: t.update(items=-1), "key 'manifest.items' is -1"),
        (lambda t: t.update(items=0), "key 'manifest.items' is 0"),
        (lambda t: t.update(users=2**31 - 1), "counts 2147483647 users but gives 'users.parquet' 40 rows"),
        (lambda t: t["interactions"].update(train=-1), "key 'manifest.interactions.train' is -1"),
        (lambda t: t["interactions"].update(trial=3), "split 'trial'"),
        (lambda t: t["interactions"].pop("test"), "does not count the rows of split 'test'"),
        (lambda t: t["interactions"].clear(), "does not count the rows of split 'train'"),
        (lambda t: t["files"][TRAIN].update(rows=-1), "rows' is -1"),
        (lambda t: t["files"][TRAIN].update(sha256="x"), "sha256' is 'x'"),
        (lambda t: t["files"].pop(TRAIN), "counts 432 rows of 'train' but lists files with 0 rows"),
        (lambda t: t["files"].pop("items.parquet"), "does not list 'items.parquet'"),
        (lambda t: t["files"].pop(FEATURE), f"does not list '{FEATURE}', a part of feature 'f'"),
        (moved(TRAIN, "../train.parquet"), "'../train.parquet' but is no file of a prepared dataset"),
        (moved(TRAIN, "interactions/train/../../../part-0.parquet"), "is no file of a prepared dataset"),
        (moved(TRAIN, "/etc/passwd"), "'/etc/passwd' but is no file"),
        (moved(TRAIN, "s3://bucket/part-0.parquet"), "is no file of a prepared dataset"),
        (moved(TRAIN, "interactions\\train\\part-0.parquet"), "is no file of a prepared dataset"),
        (moved(TRAIN, "interactions/train/part-0\0.parquet"), "a string holds the character '\\x00'"),
        (moved(TRAIN, "interactions/train/part-\n0.parquet"), "is no file of a prepared dataset"),
        (moved(FEATURE, "features/../part-0.parquet"), "is no file of a prepared dataset"),
        (lambda t: t["features"]["f"].update(parts=["../x.parquet"]), "lists '../x.parquet' as a part of feature 'f'"),
        (lambda t: t["features"]["f"].update(parts=[TOKENS]), "as a part of feature 'f', which has its own folder"),
        (lambda t: t["features"]["f"]["parts"].append(FEATURE), "lists a part of feature 'f' twice"),
        (lambda t: t["features"]["f"].update(parts=[]), "lists parts with 0 rows for feature 'f'"),
        (lambda t: t["features"]["f"].update(missing=26), "counts 26 missing of 25 items"),
        (lambda t: t["features"]["f"].update(width=0), "width' is 0"),
        (lambda t: t["features"]["f"].update(width=10**9, tokens=10**9), "which no file can hold"),
        (lambda t: t["features"]["f"].update(dtype="int8"), "dtype' is 'int8'"),
        (lambda t: t["features"].update({"a/b": t["features"].pop("f")}), "'a/b' but a feature set's name"),
        (lambda t: t["features"].update({"..": t["features"].pop("f")}), "'..' but a feature set's name"),
        (lambda t: t["features"].update({"": t["features"].pop("f")}), "'' but a feature set's name"),
        (lambda t: t["content"].update(sound=3), "counts content ['image', 'sound', 'text']"),
        (lambda t: t["content"].clear(), "counts 25 items with content {} but lists content with 25 rows"),
        (lambda t: t.update(name=["x"] * 10**5), "key 'manifest.name'"),
        (lambda t: t.update(name="\ud800"), "not valid JSON"),
        (lambda t: t.update(config=nested(100)), "nested more than 32 deep"),
        (lambda t: t.update(config={"x": float("nan")}), "the number NaN is not finite"),
        (lambda t: t.update(more=1), "unknown key 'manifest.more'"),
    ],
)  # fmt: skip
def test_manifests_that_contradict_themselves_or_lead_elsewhere(out: Path, change: Any, told: str) -> None:
    edit_manifest(out, change)
    refused(out, told)
    with pytest.raises(InputError) as caught:
        Dataset.open(str(out))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "not valid JSON"),
        (b"\x80\x04K\x01.", "manifest.json is not UTF-8 (byte 0x80 in line 1); restore it, or delete the folder"),
        (b'{"format": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "nested more than 32 deep"),
        (b'"x"', "manifest format is 'str'"),
        (b'{"format": "' + b"x" * 10**5 + b'"}', "manifest format is 'xxx"),
        (b"null", "manifest format is 'NoneType'"),
    ],
)
def test_files_that_are_no_manifest(out: Path, content: bytes, told: str) -> None:
    (out / "manifest.json").write_bytes(content)
    refused(out, told)


def test_a_manifest_that_is_too_large_is_not_read(out: Path) -> None:
    with (out / "manifest.json").open("r+b") as file:
        file.truncate((256 << 20) + 1)  # a sparse file
    refused(out, "manifest.json has 268,435,457 bytes, more than the 268,435,456 that are read")


def test_a_manifest_that_is_no_file(out: Path) -> None:
    (out / "manifest.json").unlink()
    (out / "manifest.json").mkdir()
    with pytest.raises(InputError, match=r"manifest\.json' is a folder, not a file"):
        Dataset.open(str(out))
    (out / "manifest.json").rmdir()
    (out / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="not a regular file"):
        Dataset.open(str(out))


@pytest.mark.parametrize("row", [0, 24])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_refused_where_vectors_are_read(out: Path, row: int, value: float) -> None:
    edit(out, FEATURE, with_value("vector", row, [0, 1, value, 0]))
    edit(out, TOKENS, with_value("vector", row, [0.0] * 11 + [value]))
    data = Dataset.open(str(out))
    told = rf"'{FEATURE}' item {row}: feature 2 is {value}; correct 'f.npy' and run 'distrec prepare' again"
    with pytest.raises(InputError, match=told):
        data.feature_rows("f", row, row + 1)
    with pytest.raises(InputError, match=rf"'{TOKENS}' item {row}: feature 11 is {value}"):
        data.token_rows("t-tokens", row, row + 1)
    data.feature_rows("f", 1, 24)


def test_a_feature_that_was_encoded_names_the_command_that_wrote_it(out: Path) -> None:
    edit_manifest(out, lambda tree: tree["features"]["f"].update(source=ENCODER))
    edit_manifest(out, lambda tree: tree["features"]["t-tokens"].update(source=f"{ENCODER} cut=2"))
    (out / TOKENS).unlink()
    command = f"run 'distrec encode {out} --text all-minilm-l6-v2 --image none"
    refused(
        out, f"'{TOKENS}' is listed in manifest.json but missing; {command} --tokens --text-tokens 3 --cut 2' again."
    )
    (out / FEATURE).unlink()
    refused(out, f"'{FEATURE}' is listed in manifest.json but missing; {command}' again.")


@pytest.mark.parametrize("name", [TRAIN, "items.parquet", FEATURE, TOKENS, CONTENT])
def test_a_flipped_bit_that_the_manifest_agrees_with_never_ends_in_another_error(out: Path, name: str) -> None:
    before = (out / name).read_bytes()
    footer = len(before) - 8 - int.from_bytes(before[-8:-4], "little")
    draw = np.random.default_rng(len(before))
    places = [*draw.integers(0, footer, 20), *draw.integers(footer, len(before), 60)]
    told = []
    for place in places:
        content = bytearray(before)
        content[place] ^= 1 << int(draw.integers(8))
        (out / name).write_bytes(content)
        sign(out, name)
        try:
            Dataset.open(str(out))
            read_everything(out)
        except InputError as error:
            told.append(str(error))
    assert all(name in message for message in told)
    assert len(told) > len(places) // 3


@pytest.mark.parametrize(
    ("method", "damage", "told"),
    [
        ("lightgcn", halved, "lists parts with 12 rows for feature 'f'"),
        ("lightgcn", changed(TRAIN, cast("item", "float64")), f"'{TRAIN}' column 'item' is double, must be int32"),
        ("stair", changed(FEATURE, with_value("vector", 7, [0, 0, 0, float("nan")])), "item 7: feature 3 is nan"),
        ("lightgcn", raw(VALID, lambda b: b[:99]), f"'{VALID}' cannot be read as Parquet"),
    ],
)
def test_train_ends_with_one_sentence(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, damage: Damage, told: str
) -> None:
    damage(out)
    extra = {"method": {"features": ["f"], "neighbours": [3]}} if method == "stair" else {}
    config = write_config(tmp_path / "run.yaml", str(out), tmp_path / "runs", method, **extra)
    assert main(["train", config]) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert len(shown) == 1
    assert told in shown[0]


@pytest.mark.parametrize("verb", ["check", "encode"])
def test_check_and_encode_refuse_the_same(out: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    edit(out, TRAIN, cast("item", "float64"))
    assert main([verb, str(out)]) == 2
    assert f"'{TRAIN}' column 'item' is double" in capsys.readouterr().err
