from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from distrec.data.check import check
from distrec.data.dataset import Dataset
from tests.data.imported import ITEMS, original, refuse, tables
from tests.data.raw import write


def stored_features(dataset: Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    return dataset.feature_rows(name, 0, dataset.items)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("way", ["npy", "parquet by row", "parquet by key"])
def test_features_reach_their_items(
    tmp_path: Path, raw: dict, way: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(len(way))
    count = len(raw["items"])
    values = rng.normal(size=(count, 5)).astype(dtype)
    values[3] = 0
    monkeypatch.setattr("distrec.data.parts.ITEMS_PER_PART", 10)
    monkeypatch.setattr("distrec.data.importers.features._CHUNK", 7)
    absent = np.zeros(count, bool)
    if way == "npy":
        np.save(tmp_path / "raw/f.npy", values)
        feature = {"files": "f.npy"}
    else:
        order = np.arange(count)
        if way == "parquet by key":
            order = rng.permutation(count)[:-4]
            absent[np.setdiff1d(np.arange(count), order)] = True
        for part, chunk in enumerate(np.array_split(order, 2)):
            flat = pa.array(values[chunk].reshape(-1))
            lists = pa.FixedSizeListArray.from_arrays(flat, 5) if part else pa.array(list(values[chunk]))
            write(tmp_path / f"raw/f-{part}.parquet", {"v": lists, "k": [str(i) for i in raw["items"][chunk]]})
        feature = {"files": "f-*.parquet", "column": "v"}
        feature |= {"id": "k"} if way == "parquet by key" else {}
    zeros = {**feature, "zeros_are_missing": True}
    dataset = tables(tmp_path, items=ITEMS, features={"plain": feature, "zeros": zeros})
    place = {int(i): row for row, i in enumerate(raw["items"])}
    rows = [place[i] for i in original(dataset)]
    found, missing = stored_features(dataset, "plain")
    assert dataset.manifest.features["plain"].dtype == ("float16" if dtype == "float16" else "float32")
    assert len(dataset.manifest.features["plain"].parts) == -(-count // 10)
    assert np.array_equal(missing, absent[rows])
    assert np.array_equal(found[~missing], values[rows][~missing].astype(np.float32))
    assert not found[missing].any()
    absent[3] = True
    assert np.array_equal(stored_features(dataset, "zeros")[1], absent[rows])
    assert dataset.manifest.features["zeros"].missing == absent.sum()
    check(str(tmp_path / "out"))


def test_bad_feature_arrays(tmp_path: Path, raw: dict) -> None:
    count = len(raw["items"])
    good = np.random.default_rng(0).normal(size=(count, 4))

    def bad(row: int, value: float) -> np.ndarray:
        values = good.copy()
        values[row, 2] = value
        return values

    cases = {
        "short": (good[:-1], f"has {count - 1} feature rows for {count} items"),
        "nan": (bad(5, np.nan), r"'nan.npy' row 5: feature 2 is nan"),
        "inf": (bad(count - 1, -np.inf).astype(np.float16), rf"'inf.npy' row {count - 1}: feature 2 is -inf"),
        "huge": (bad(6, 1e200), r"'huge.npy' row 6: feature 2 is 1e\+200"),
        "ints": (np.ones((count, 4), np.int64), "holds int64; features must be float16"),
        "flat": (good[:, 0], rf"has shape \[{count}\]; features are \[items, width\]"),
        "objects": (np.array([{}], object), "is not readable as NumPy array"),
    }
    for name, (values, message) in cases.items():
        np.save(tmp_path / f"raw/{name}.npy", values, allow_pickle=True)
        refuse(tmp_path, message, items=ITEMS, features={"f": {"files": f"{name}.npy"}})
    np.save(tmp_path / "raw/cut.npy", good)
    (tmp_path / "raw/cut.npy").write_bytes((tmp_path / "raw/cut.npy").read_bytes()[:-9])
    refuse(tmp_path, "'cut.npy' is not readable as NumPy array", items=ITEMS, features={"f": {"files": "cut.npy"}})
    refuse(tmp_path, "gives features by row, but no items table", features={"f": {"files": "nan.npy"}})
    refuse(tmp_path, "no file 'nope.npy'", items=ITEMS, features={"f": {"files": "nope.npy"}})


def header(text: str) -> bytes:
    """A .npy file of version 1 with a header of any content."""
    line = text.encode("latin-1").ljust(118 - 10 + 9) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line + bytes(64)


@pytest.mark.parametrize(
    "shape", ["(6, -4)", "(-6, -4)", "(2**70, 1)", f"({2**62}, {2**62})", f"({2**70}, 1)", "(6, 4.0)", "6", "((6, 4),)"]
)
def test_hostile_shapes(tmp_path: Path, raw: dict, shape: str) -> None:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    (tmp_path / "raw/f.npy").write_bytes(header(text))
    refuse(tmp_path, "file 'f.npy' is not readable as NumPy", items=ITEMS, features={"f": {"files": "f.npy"}})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "(",
        "{" * 60,
        "{'descr': '<f4'}",
        "{'descr': 5, 'fortran_order': 0, 'shape': 1}",
        "'\\ud800'",
        "{'descr': [('a',)], 'fortran_order': False, 'shape': (6, 4), }",
    ],
)
def test_hostile_headers(tmp_path: Path, raw: dict, text: str) -> None:
    (tmp_path / "raw/f.npy").write_bytes(header(text))
    refuse(tmp_path, "file 'f.npy' is not readable as NumPy", items=ITEMS, features={"f": {"files": "f.npy"}})


def test_an_archive_of_arrays_is_refused(tmp_path: Path, raw: dict) -> None:
    with open(tmp_path / "raw/f.npy", "wb") as file:
        np.savez(file, a=np.ones((6, 4), np.float32))
    message = r"file 'f.npy' is an archive of arrays \(.npz\); save one array with numpy.save"
    refuse(tmp_path, message, items=ITEMS, features={"f": {"files": "f.npy"}})


def test_bad_feature_tables(tmp_path: Path, raw: dict) -> None:
    keys, count = [int(i) for i in raw["items"]], len(raw["items"])
    good = [[float(i), 1.0] for i in keys]
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "width": ({"v": [*good[:-1], [1.0]]}, rf"row {count - 1}: 'v' has width 1 but others have 2"),
        "twice": ({"k": [*keys[:-1], keys[0]]}, rf"row {count - 1}: a second vector for k {keys[0]}"),
        "nan": ({"v": [*good[:2], [0.0, float("nan")], *good[3:]]}, r"row \d+: feature 1 is nan"),
        "hole": ({"v": [[None, 1.0], *good[1:]]}, "contains an empty number"),
        "ints": ({"v": [[1, 2]] * count}, "column 'v' holds int64; features must be float16"),
        "words": ({"v": ["x"] * count}, "column 'v' holds string; features must be lists of floats"),
        "other": ({"k": [k + 1 for k in keys]}, "no k is among the"),
        "null": ({"v": pa.nulls(count, pa.list_(pa.float32()))}, "'v' is empty"),
    }
    for name, (columns, message) in cases.items():
        write(tmp_path / f"raw/{name}.parquet", {"k": keys, "v": good, **columns})
        feature = {"files": f"{name}.parquet", "id": "k", "column": "v"}
        refuse(tmp_path, message, items=ITEMS, features={"f": feature})
    for rows in (good[:-1], [*good, good[0]]):
        write(tmp_path / "raw/rows.parquet", {"v": rows})
        feature = {"files": "rows.parquet", "column": "v"}
        refuse(tmp_path, f"has {len(rows)} feature rows for {count} items", items=ITEMS, features={"f": feature})
    write(tmp_path / "raw/a.parquet", {"k": keys[:9], "v": good[:9]})
    write(tmp_path / "raw/b.parquet", {"k": keys[8:], "v": good[8:]})
    feature = {"files": ["a.parquet", "b.parquet"], "id": "k", "column": "v"}
    refuse(tmp_path, f"'b.parquet' row 0: a second vector for k {keys[8]}", items=ITEMS, features={"f": feature})
    write(tmp_path / "raw/b.parquet", {"k": keys[9:], "v": [[*row, 1.0] for row in good[9:]]})
    message = "'b.parquet' row 0: a vector of 3 float64 but others have 2 float64"
    refuse(tmp_path, message, items=ITEMS, features={"f": feature})


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "", "a b", "x" * 61, "a\\b", "-a"])
def test_a_name_that_cannot_be_a_folder_is_refused(tmp_path: Path, raw: dict[str, np.ndarray], name: str) -> None:
    np.save(tmp_path / "raw/f.npy", np.ones((len(raw["items"]), 2), np.float32))
    refuse(
        tmp_path, "a feature set's name is also a folder's: use at", items=ITEMS, features={name: {"files": "f.npy"}}
    )
    assert not (tmp_path / "out").exists()
