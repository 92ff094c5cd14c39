import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from distrec.arguments import parse
from distrec.data.dataset import Dataset, vector_table, write_part
from distrec.data.manifest import FORMAT, FeatureEntry, Manifest, write_manifest
from distrec.data.storage import Folder, open_folder
from distrec.data.synth import write_ids
from distrec.errors import InputError

ITEMS, USERS = 23, 11


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.multiprocess)])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "data") if request.param == "local" else f"{request.getfixturevalue('s3')}/data"


def write(
    where: str, dtype: Any = np.float32, tokens: int = 1, **changes: Any
) -> tuple[Folder, np.ndarray, np.ndarray]:
    """A dataset whose train split has 2 parts and whose feature has parts of 9, 0, 5 and 9 rows in groups of 4.

    In a token set, the numbers of real tokens cycle through 1, 2, …, and padding has values too.
    """
    folder, rng = open_folder(where), np.random.default_rng(0)
    files = write_ids(folder, USERS, ITEMS)
    for number, rows in enumerate((7, 5)):
        last = 6 * number  # the second part goes on with the last user of the first
        name = f"interactions/train/part-{number:05d}.parquet"
        table = pa.table(
            {
                "user": np.full(rows, last, np.int32) if number else np.arange(rows, dtype=np.int32),
                "item": np.full(rows, number, np.int32),
                "timestamp": np.arange(rows, dtype=np.int64) + 2**40 + last,
            }
        )
        files[name] = write_part(folder, name, table)
    values = rng.normal(size=(ITEMS, 3 * tokens)).astype(dtype)
    missing = rng.random(ITEMS) < 0.3
    count = np.where(missing, 0, np.arange(ITEMS) % tokens + 1).astype(np.int32)
    parts, start = [], 0
    for number, rows in enumerate((9, 0, 5, 9)):
        name = f"features/text/part-{number:05d}.parquet"
        at = slice(start, start + rows)
        part = vector_table(start, values[at], missing[at], count[at] if tokens > 1 else None)
        files[name] = write_part(folder, name, part, row_group_rows=4)
        parts.append(name)
        start += rows
    feature = FeatureEntry(
        tokens=tokens, width=3, dtype=np.dtype(dtype).name, missing=int(missing.sum()), source="drawn", parts=parts
    )
    fields = {
        "format": FORMAT, "name": "made", "users": USERS, "items": ITEMS,
        "interactions": {"train": 12, "valid": 0, "test": 0},
        "split": "given", "id_order": "given", "features": {"text": feature}, "content": {}, "config": {},
        "files": files,
    }  # fmt: skip
    write_manifest(folder, Manifest(**(fields | changes)))
    return folder, values, missing


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_any_range_of_feature_rows_equals_the_whole(where: str, dtype: Any):
    _, values, missing = write(where, dtype)
    data = Dataset.open(where)
    whole = np.where(missing[:, None], 0, values).astype(np.float32)
    for start in range(ITEMS + 1):
        for stop in sorted({start, start + 1, start + 6, ITEMS} & set(range(start, ITEMS + 1))):
            found, gone = data.feature_rows("text", start, stop)
            assert found.dtype == np.float32
            assert np.array_equal(found, whole[start:stop])
            assert np.array_equal(gone, missing[start:stop])


def test_any_range_of_token_rows_equals_the_whole(where: str):
    _, values, missing = write(where, np.float16, tokens=5)
    data = Dataset.open(where)
    whole = np.where(missing[:, None, None], 0, values.reshape(ITEMS, 5, 3)).astype(np.float16)
    real = np.where(missing, 0, np.arange(ITEMS) % 5 + 1)
    for start in range(ITEMS + 1):
        for stop in sorted({start, start + 1, start + 6, ITEMS} & set(range(start, ITEMS + 1))):
            found, count, gone = data.token_rows("text", start, stop)
            assert (found.dtype, count.dtype, gone.dtype) == (np.float16, np.int32, bool)
            assert np.array_equal(found, whole[start:stop])
            assert np.array_equal(count, real[start:stop])
            assert np.array_equal(gone, missing[start:stop])


def test_the_other_kind_of_set_is_refused(tmp_path: Path):
    write(str(tmp_path / "plain"))
    write(str(tmp_path / "tokens"), np.float16, tokens=2)
    with pytest.raises(InputError, match="'text' has one vector per item but several are needed"):
        Dataset.open(str(tmp_path / "plain")).token_rows("text", 0, 1)
    with pytest.raises(InputError, match="'text' has 2 vectors per item but one is needed"):
        Dataset.open(str(tmp_path / "tokens")).feature_rows("text", 0, 1)


def test_a_plain_set_is_written_and_identified_as_before_token_sets(tmp_path: Path):
    folder, *_ = write(str(tmp_path))
    assert set(folder.read_json("manifest.json")["features"]["text"]) == {
        "width", "dtype", "missing", "source", "parts"
    }  # fmt: skip
    assert Dataset.open(str(tmp_path)).feature("text").tokens == 1


def test_only_the_row_groups_asked_for_are_read(tmp_path: Path):
    folder, values, missing = write(str(tmp_path))
    last = folder.at("features", "text", "part-00003.parquet")
    Path(last).write_bytes(b"not Parquet")
    with pytest.raises(InputError, match=r"'features/text/part-00003\.parquet' has 11 bytes but manifest.json says"):
        Dataset.open(str(tmp_path))
    found, _ = Dataset.open(str(tmp_path), checked=True).feature_rows("text", 0, 14)
    assert np.array_equal(found[~missing[:14]], values[:14][~missing[:14]])


def test_a_value_stored_in_a_missing_row_does_not_leak(tmp_path: Path):
    _, values, missing = write(str(tmp_path))
    assert np.abs(values[missing]).max() > 0
    found, _ = Dataset.open(str(tmp_path)).feature_rows("text", 0, ITEMS)
    assert np.abs(found[missing]).max() == 0


def test_parts_of_a_split_join_in_order(where: str):
    write(where)
    train = Dataset.open(where).interactions("train")
    assert train.user.tolist() == [*range(7), *[6] * 5]
    assert train.item.tolist() == [0] * 7 + [1] * 5
    assert train.timestamp.tolist() == [2**40 + n for n in [*range(7), *range(6, 11)]]
    assert (train.user.dtype, train.item.dtype, train.timestamp.dtype) == (np.int32, np.int32, np.int64)
    assert len(Dataset.open(where).interactions("valid")) == 0


def test_a_changed_or_missing_file_is_refused_by_name(where: str):
    folder, *_ = write(where)
    name = "interactions/train/part-00001.parquet"
    content = folder.read_bytes(name)
    folder.write_bytes(content[:9] + bytes([content[9] ^ 1]) + content[10:], name)
    with pytest.raises(InputError, match=f"checksum of '{name}' differs"):
        Dataset.open(where).interactions("train")
    folder.remove(name)
    for checked in (False, True):
        with pytest.raises(InputError, match=f"'{name}' is listed in manifest.json but missing"):
            Dataset.open(where, checked).interactions("train")


@pytest.mark.parametrize(("bound", "side"), [({"users": 6}, "user 6"), ({"items": 1}, "item 1")])
def test_an_id_beyond_the_manifest_is_refused_with_its_row(tmp_path: Path, bound: dict[str, int], side: str):
    write(str(tmp_path), **bound)
    part, row = (0, 6) if "users" in bound else (1, 0)
    with pytest.raises(InputError, match=f"part-0000{part}.parquet' row {row} has {side} but manifest.json counts"):
        Dataset.open(str(tmp_path), checked=True).interactions("train")


def test_what_is_no_dataset_is_refused(where: str):
    with pytest.raises(InputError, match=r"has no manifest.json \(nothing is there\)"):
        Dataset.open(where)
    folder, *_ = write(where)
    tree = folder.read_json("manifest.json")
    folder.remove("manifest.json")
    with pytest.raises(
        InputError, match=r"\('features', 'interactions', 'items.parquet', … are there\); give a folder"
    ):
        Dataset.open(where)
    folder.write_bytes(b"", "prepare.unfinished")
    with pytest.raises(InputError, match=r"\(an interrupted prepare is there\); run 'distrec prepare"):
        Dataset.open(where)
    with pytest.raises(InputError, match=r"\(it is a file\); give a folder"):
        Dataset.open(f"{where}/items.parquet")
    for content, told in (
        (b"{", "is not valid JSON"),
        (b"[]", "manifest format is 'list'"),
        (b"{}", "manifest format is None"),
        (b'{"format": 99}', "manifest format is 99"),
        (b'{"format": 1}', "key 'manifest.name' is missing"),
    ):
        folder.write_bytes(content, "manifest.json")
        with pytest.raises(InputError, match=told):
            Dataset.open(where)
    folder.write_json(tree | {"users": "11"}, "manifest.json")
    with pytest.raises(InputError, match=r"key 'manifest\.users' is '11'"):
        Dataset.open(where)


def test_an_unknown_feature_names_the_nearest(tmp_path: Path):
    write(str(tmp_path / "a"))
    with pytest.raises(InputError, match="has no feature 'txt'; did you mean 'text'"):
        Dataset.open(str(tmp_path / "a")).feature_rows("txt", 0, 1)
    write(str(tmp_path / "b"), features={})
    with pytest.raises(InputError, match="the dataset has no features; run 'distrec encode'"):
        Dataset.open(str(tmp_path / "b")).feature("text")


def test_the_hash_is_the_content_and_not_the_place(tmp_path: Path):
    for name in "ab":
        write(str(tmp_path / name))
    write(str(tmp_path / "c"), name="other")
    write(str(tmp_path / "d"), dtype=np.float16)
    hashes = [Dataset.open(str(tmp_path / name)).hash for name in "abcd"]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_reading_interactions_leaves_no_thread_behind(tmp_path: Path) -> None:
    """Arrow's threads may need the interpreter while it ends, which aborted `distrec` in place of its exit status."""
    write(str(tmp_path / "data"))
    code = (
        "import os, sys; from distrec.data.dataset import Dataset;"
        "data = Dataset.open(sys.argv[1], checked=True);"  # without the threads that look at files
        "before = set(os.listdir('/proc/self/task')); data.interactions('train');"
        "sys.exit(bool(set(os.listdir('/proc/self/task')) - before))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "data")], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("name", "tokens", "ending", "options"),
    [
        ("image", 1, "", ""),
        ("image-tokens", 49, "", " --tokens"),
        ("image-tokens", 9, " pool=3", " --tokens --image-pool 3"),
        ("image-tokens-cut1", 49, " cut=1 pool=3", " --tokens --cut 1 --image-pool 3"),
    ],
)
def test_the_remedy_names_the_set_s_own_encoder(name: str, tokens: int, ending: str, options: str) -> None:
    source = f"encoder /my models/vit 0123456789abcdef{ending}"
    entry = FeatureEntry(tokens=tokens, width=4, dtype="float16", missing=0, source=source, parts=[])
    command = f"distrec encode s3://b/d --image '/my models/vit' --text none{options}"
    assert entry.remedy(name, "s3://b/d") == f"run '{command}' again"
    assert parse(shlex.split(command)[1:]).verb == "encode"
