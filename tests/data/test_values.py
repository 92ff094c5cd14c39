"""Ids, ratings, times and labels: what they become, and which row is named if one does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distrec.data.importers.base import read_ids
from distrec.data.importers.rows import Rows
from distrec.data.importers.values import labels, mixed_units, numbers, times
from distrec.errors import InputError
from tests.data.imported import ITEMS, refuse, tables
from tests.data.raw import SOURCE, interactions, original_rows, write


def text(values: list[Any]) -> Rows:
    return Rows(pa.table({"c": pa.array(values, pa.string())}), [("x.csv", len(values))], typed=False)


def typed(values: Any) -> Rows:
    return Rows(pa.table({"c": values}), [("x.parquet", len(values))], typed=True)


INVISIBLE = ["\u200b", "\ufeff\u200d", "\0", "\t\u2060 ", "\u3000", "\u00ad"]

# --- ids ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["1", "20", "3"], [1, 20, 3]),
        (["1.0", "20.", "3"], [1, 20, 3]),
        (["007", "8"], ["007", "8"]),
        (["-1", "8"], ["-1", "8"]),
        (["-1.0", "8"], ["-1.0", "8"]),
        (["0x10", "8"], ["0x10", "8"]),
        ([str(2**63 - 1), "8"], [2**63 - 1, 8]),
        ([str(2**63), "8"], [str(2**63), "8"]),
        (["9" * 5000, "8"], ["9" * 5000, "8"]),
        (["18446744073709551615.0", "8"], ["18446744073709551615.0", "8"]),
        ([" 8", "8"], [" 8", "8"]),
        (["a", "8.5"], ["a", "8.5"]),
        (["\u200ba", "b\0"], ["\u200ba", "b\0"]),
    ],
)
def test_ids_in_text(values: list[str], expected: list[Any]) -> None:
    assert read_ids(text(values), "c").to_pylist() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([1, 2**63 + 5], pa.uint64()), ["1", str(2**63 + 5)]),
        (pa.array([1, 5], pa.uint64()), [1, 5]),
        (pa.array([1, 5], pa.decimal128(30)), [1, 5]),
        (pa.array([1.0, 5.0]), [1, 5]),
        (pa.array(["7", "007"], pa.large_string()), ["7", "007"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
    ],
)
def test_ids_in_parquet(values: pa.Array, expected: list[Any]) -> None:
    assert read_ids(typed(values), "c").to_pylist() == expected


def test_decimal_ids_beyond_int64() -> None:
    big = pa.array(["1", "100000000000000000000"]).cast(pa.decimal128(30, 0))
    assert read_ids(typed(big), "c").to_pylist() == ["1", "100000000000000000000"]
    with pytest.raises(InputError, match="ids must be integers or strings"):
        read_ids(typed(pa.array(["1.5"]).cast(pa.decimal128(5, 2))), "c")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (text(["1", None, "3"]), "'x.csv' row 1: c is empty"),
        (text(["1", "  ", "3"]), r"'x.csv' row 1: c is blank \('  '\)"),
        (text(["1", "2.5", "3"]), "'x.csv' row 1: c is 2.5, a fractional id"),
        (typed(["1", None, "3"]), "'x.parquet' row 1: c is empty"),
        (typed(["1", "", "3"]), r"'x.parquet' row 1: c is blank \(''\)"),
        (typed(["1", "\u00a0\t", "3"]), "'x.parquet' row 1: c is blank"),
        (typed(pa.array(["1", "", "3"]).dictionary_encode()), "'x.parquet' row 1: c is blank"),
        (typed([1, -2]), "'x.parquet' row 1: c is -2, a negative id; number from 0 or write the column as strings"),
        (typed([1.0, float("nan")]), "'x.parquet' row 1: c is missing \\(NaN\\); fill it"),
        (typed([1.0, float("inf")]), "'x.parquet' row 1: c is inf, not an id"),
        (typed([1.0, 1e25]), r"'x.parquet' row 1: c 1e\+25 is too large for an exact whole number"),
        (typed([True]), "column 'c' holds bool; ids must be"),
        *((kind(["1", mark, "3"]), "row 1: c is blank") for kind in (text, typed) for mark in INVISIBLE),
    ],
)
def test_ids_that_are_refused(rows: Rows, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_ids(rows, "c")


@pytest.mark.parametrize("kind", ["users", "items", "items table", "images", "features"])
@pytest.mark.parametrize("value", ["", "  ", None])
def test_empty_and_blank_ids_are_refused_everywhere(tmp_path: Path, raw: dict, kind: str, value: str | None) -> None:
    columns = interactions(seed=1)
    ids: list[Any] = [str(i) for i in raw["items"]]
    if kind in ("users", "items"):
        name = kind[0]
        columns[name] = pa.array([str(v) if row != 9 else value for row, v in enumerate(columns[name])])
        write(tmp_path / "raw/interactions.parquet", columns)
        refuse(tmp_path, rf"'interactions.parquet' row 9: {name} is (blank|empty)")
        return
    ids[9] = value
    if kind == "items table":
        write(tmp_path / "raw/items.parquet", {"i": ids})
        refuse(tmp_path, r"'items.parquet' row 9: i is (blank|empty)", items=ITEMS)
    elif kind == "images":
        write(tmp_path / "raw/p.parquet", {"i": ids, "jpeg": pa.array([b"x"] * len(ids), pa.binary())})
        images = {"files": "p.parquet", "id": "i", "column": "jpeg"}
        refuse(tmp_path, r"'p.parquet' row 9: i is (blank|empty)", items=ITEMS, images=images)
    else:
        write(tmp_path / "raw/f.parquet", {"i": ids, "vector": [[1.0]] * len(ids)})
        features = {"f": {"files": "f.parquet", "id": "i"}}
        refuse(tmp_path, r"'f.parquet' row 9: i is (blank|empty)", items=ITEMS, features=features)


def test_rows_of_later_batches_are_named_by_their_place_in_the_file(
    tmp_path: Path, raw: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distrec.data.importers.features._CHUNK", 4)
    ids = [str(i) if row != 9 else "" for row, i in enumerate(raw["items"])]
    write(tmp_path / "raw/f.parquet", {"i": ids, "vector": [[1.0]] * len(ids)})
    refuse(tmp_path, r"'f.parquet' row 9: i is blank", items=ITEMS, features={"f": {"files": "f.parquet", "id": "i"}})


def test_hashes_as_ids_agree_across_kinds_of_files(tmp_path: Path) -> None:
    columns = interactions(seed=1)
    items = np.unique(columns["i"]).astype(np.uint64) + np.uint64(2**63)
    write(tmp_path / "raw/items.parquet", {"i": pa.array(items, pa.uint64())})
    write(tmp_path / "raw/log.csv", {**columns, "i": [str(int(i) + 2**63) for i in columns["i"]]})
    dataset = tables(tmp_path, interactions={"files": "log.csv", **SOURCE}, items=ITEMS)
    assert sorted(dataset.items_table()["original"].to_pylist()) == sorted(str(int(i)) for i in items)
    assert len(original_rows(dataset)) == len(columns["i"])


# --- numbers, times and labels -------------------------------------------------------------------------------------


def test_numbers() -> None:
    assert numbers(text(["1", " 2.5", "1e3"]), "c").tolist() == [1, 2.5, 1000]
    assert numbers(text(["true", "False"]), "c").tolist() == [1, 0]
    assert numbers(typed([True, False]), "c").tolist() == [1, 0]
    many = ["3.5"] * 1000
    for odd, message in {
        "good": "c is 'good', not a number", "3,5": "c is '3,5', not a number", "nan": "c is nan; give a finite",
        "9" * 5000: "c is inf; give a finite", "x" * 5000: r"c is 'x{60}…', not a number",
    }.items():  # fmt: skip
        for row in (0, 1, 500, 999):
            with pytest.raises(InputError, match=rf"'x.csv' row {row}: {message}"):
                numbers(text([*many[:row], odd, *many[row + 1 :]]), "c")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["5", "-3"], [5, -3]),
        (["978300760.0", "1e9"], [978300760, 10**9]),
        (["1970-01-02", "1970-01-03"], [1, 2]),
        (["1970-01-01 00:00:05", "1970-01-01T00:01"], [5, 60]),
        (["1970-01-01 00:00:05", "1970-01-02"], [5, 86400]),
        (["1970-01-01 00:00:05Z", "1970-01-01T01:00:00+01:00"], [5, 0]),
        (["1970-01-01 00:00:05.5", "1970-01-01"], [5_500_000_000, 0]),
        ([" 1970-01-02 ", "1970-01-03"], [1, 2]),
    ],
)
def test_times_in_text(values: list[str], expected: list[int]) -> None:
    assert times(text(values), "c").tolist() == expected
    assert times(typed([value.strip() for value in values]), "c").tolist() == expected


@pytest.mark.parametrize(
    ("usual", "odd", "message"),
    [
        ("2021-03-01 10:00:00", "unknown", "'unknown', but 99 of 100 values are times such as '2021-03-01 10:00:00'"),
        ("2021-03-01", "2021-13-01", "'2021-13-01', not in the range that dates can have"),
        ("2021-03-01", "01/02/2021", "'01/02/2021', but 99 of 100 values are dates such as '2021-03-01'"),
        ("2021-03-01", "20210301", "'20210301', but 99 of 100 values are dates"),
        ("1614592800", "2021-03-01", "'2021-03-01', but 99 of 100 values are whole numbers such as '1614592800'"),
        ("1614592800", "n/a", "'n/a', but 99 of 100 values are whole numbers"),
        ("1614592800", "1.5", "1.5; give whole seconds or milliseconds"),
        ("1614592800", "9" * 30, "'9{30}', not in the range that whole numbers can have"),
        ("1614592800.0", "soon", "'soon', but 99 of 100 values are numbers such as '1614592800.0'"),
        ("2021-03-01T10:00:00Z", "2021-03-01 10:00", "'2021-03-01 10:00', but 99 of 100 values are times with a zone"),
        ("2021-03-01 10:00:00", None, "empty"),
    ],
)
def test_one_odd_time_is_named(usual: str, odd: str | None, message: str) -> None:
    for row in (0, 17, 99):
        values = [usual] * 100
        values[row] = odd  # type: ignore[call-overload]
        with pytest.raises(InputError, match=rf"'x.csv' row {row}: c is {message}"):
            times(text(values), "c")


@pytest.mark.parametrize("others", [["0x7ffffffe"], ["1614592800"]])
def test_hexadecimal_numbers_are_no_times(others: list[str]) -> None:
    message = "'0x7fffffff', " + ("not a time" if others[0][:2] == "0x" else "but 3 of 4 values are whole numbers")
    with pytest.raises(InputError, match=f"c is {message}"):
        times(text(["0x7fffffff", *others * 3]), "c")


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1, 2], pa.time32("s")),
        pa.array([1, 2], pa.time64("us")),
        pa.array([1, 2], pa.duration("ms")),
        pa.array([True, False]),
        pa.array([[1], [2]]),
    ],
)
def test_types_that_are_no_times(values: pa.Array) -> None:
    with pytest.raises(InputError, match=r"'x\.parquet': column 'c' holds .*; a time is an integer, a date"):
        times(typed(values), "c")


def test_seconds_among_milliseconds_are_noted() -> None:
    seconds, milliseconds = [1614592800 + n for n in range(5)], [1614592800123, 1614592900456]
    message = (
        "c holds 5 values of 10 digits, like seconds (1614592800 to 1614592804), and 2 values of 13 digits, like "
        "milliseconds (1614592800123 to 1614592900456); if units are mixed, write all times in one"
    )
    for rows in (text([*map(str, seconds), *map(str, milliseconds)]), typed(seconds + milliseconds)):
        assert mixed_units(rows, "c", times(rows, "c")) == [f"{rows.name}: {message}"]
    for alone in (seconds, milliseconds, [0, 5, 1614592800], [5, 1614592800123]):
        assert not mixed_units(typed(alone), "c", times(typed(alone), "c"))
    stamps = typed(pa.array([5_000_000_000, 1614592800123], pa.timestamp("ms")))
    assert not mixed_units(stamps, "c", times(stamps, "c"))


def test_prepare_prints_that_units_are_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = interactions(seed=1)
    columns["t"] = columns["t"] + 1614592800
    columns["t"][::2] = 1614592800123 + np.arange(len(columns["t"][::2]))
    write(tmp_path / "raw/log.csv", columns)
    tables(tmp_path, interactions={"files": "log.csv", **SOURCE})
    assert "  note      'log.csv': t holds " in capsys.readouterr().out


def test_labels() -> None:
    assert labels(text(["train", " valid", "test"]), "c").tolist() == [0, 1, 2]
    assert labels(text(["0", "1.0", "2"]), "c").tolist() == [0, 1, 2]
    assert labels(typed([0.0, 1.0, 2.0]), "c").tolist() == [0, 1, 2]
    for rows, message in [
        (text(["0", "dev", "x"]), "'x.csv' row 1: c is dev; a split is"),
        (text(["0", None, "x"]), "'x.csv' row 1: c is empty"),
        (text(["0", "1.5", "x"]), "'x.csv' row 1: c is 1.5; a split is"),
        (typed([0, 3]), "'x.parquet' row 1: c is 3; a split is"),
        (typed([0.0, 1.5]), "'x.parquet' row 1: c is 1.5; a split is"),
        (typed(["train", ""]), "'x.parquet' row 1: c is empty; a split is"),
    ]:
        with pytest.raises(InputError, match=message):
            labels(rows, "c")


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    columns = interactions(seed=1)
    table = pa.Table.from_arrays([pa.array(v) for v in (*columns.values(), columns["u"])], [*columns, "u"])
    (tmp_path / "raw").mkdir()
    pq.write_table(table, tmp_path / "raw/twice.parquet")
    refuse(tmp_path, "'twice.parquet' has two columns named 'u'", interactions={"files": "twice.parquet", **SOURCE})
    (tmp_path / "raw/twice.inter").write_text("u:token\ti:token\tr:float\tt:float\tu:token\n1\t2\t3\t4\t5\n")
    refuse(tmp_path, "'twice.inter' has two columns named 'u'", interactions={"files": "twice.inter", **SOURCE})
