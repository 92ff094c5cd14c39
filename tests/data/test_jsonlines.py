"""JSON lines: types of columns, whatever the lines that are converted at a time, and lines that are refused."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distrec.data.importers.base import read_ids
from distrec.data.importers.content import strings
from distrec.data.importers.delimited import read_delimited
from distrec.data.importers.formats import TableFiles, form
from distrec.data.importers.jsonlines import read_json_lines
from distrec.data.importers.rows import Rows
from distrec.data.importers.tables import InteractionsTable
from distrec.errors import InputError


def read(path: Path, text: str, columns: list[str]) -> Rows:
    path.write_text(text)
    return read_json_lines(str(path), form(path.name, TableFiles(files=[]), "k"), columns)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"u": 1, "i": 2', r"row 2 \(line 4\): not a JSON object \(Expecting"),
        ("[1, 2]", r"row 2 \(line 4\): holds \[1, 2\], not a JSON object"),
        ("{'u': 1}", r"row 2 \(line 4\): not a JSON object"),
        ('{"u": 1, "i": 2, "i": 3}', r"row 2 \(line 4\): .*key 'i' appears twice"),
        ('{"u": ' + "9" * 5000 + "}", r"row 2 \(line 4\): an integer of thousands of digits; write it as a string"),
        ('{"u": ' + "[" * 100_000 + "]" * 100_000 + "}", r"row 2 \(line 4\): the object is nested too deeply"),
        ('{"u": {"a": 1}, "i": 1}', r"row 2 \(line 4\): u holds an object"),
        ('{"u": "\\ud800", "i": 1}', r"row 2 \(line 4\): u holds half of a surrogate pair"),
    ],
)
def test_bad_json_lines(tmp_path: Path, line: str, message: str) -> None:
    lines = '{"u": 1, "i": 1}\n\n{"u": 1, "i": 2}\n' + line + '\n{"u": 1, "i": 3}\n'
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / "x.jsonl", lines, ["u", "i"])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("rows", [1, 100_000])
def test_json_columns_take_the_type_that_fits(tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distrec.data.importers.jsonlines._ROWS", rows)
    cases: dict[str, tuple[list[Any], list[Any]]] = {
        "integers": ([1, None, 3], [1, None, 3]),
        "numbers": ([1, 2.5, None], [1.0, 2.5, None]),
        "large": ([1, 2**63, 3], ["1", str(2**63), "3"]),
        "mixed": ([1, "a", 2.5], ["1", "a", "2.5"]),
        "flags": ([True, None, False], [True, None, False]),
        "lists": ([["a", ["b", None, 3]], "c", None], [["a", "b", "3"], ["c"], None]),
        "none": ([None, None, None], [None, None, None]),
        "whole": ([5.0, "a", 5], ["5", "a", "5"]),
        "beside lists": ([5.0, ["a"], 5], [["5"], ["a"], ["5"]]),
        "exact": ([2**53 + 1, 0.5, 3], [str(2**53 + 1), "0.5", "3"]),
    }
    lines = [json.dumps({name: values[row] for name, (values, _) in cases.items()}) for row in range(3)]
    found = read(tmp_path / "x.json", "\n".join(lines), list(cases))
    for name, (_, expected) in cases.items():
        assert found.table[name].to_pylist() == expected, name


def word(value: str | float) -> str:
    """How a value is written in a column of strings."""
    whole = isinstance(value, float) and value.is_integer() and abs(value) <= 2**53
    return value if isinstance(value, str) else json.dumps(int(value) if whole else value)


@pytest.mark.parametrize("seed", range(8))
def test_a_json_column_does_not_depend_on_how_many_lines_are_converted_at_a_time(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    values: list[Any] = [None, 5, 5.0, 0.5, -3, 1e20, 2**53 + 1, 2**70, "5", "b", True, ["c", 5.0], []]
    columns = [[values[at] for at in rng.permutation(len(values))[: rng.integers(1, 5)]] for _ in range(30)]
    rows = [{f"c{at}": kinds[rng.integers(len(kinds))] for at, kinds in enumerate(columns)} for _ in range(12)]
    found = []
    for size in (100_000, 1, 2, 5):
        monkeypatch.setattr("distrec.data.importers.jsonlines._ROWS", size)
        found.append(read(tmp_path / "x.json", "\n".join(map(json.dumps, rows)), list(rows[0])))
    for name in rows[0]:
        once = found[0].table[name].to_pylist()
        assert all(other.table[name].to_pylist() == once for other in found), name
        if all(isinstance(row[name], str | float | int | None) for row in rows):
            same = [row[name] for row in rows]
            assert once in (same, [None if v is None else word(v) for v in same])
    assert found[0].at(3) == "'x.json' row 3 (line 4)"


def log(path: Path, ids: str) -> Rows:
    path.write_text("".join(f'{{"user": {word}, "item": 1}}\n' for word in ids.split()))
    return read_json_lines(str(path), form(path.name, InteractionsTable(files=[path.name]), "k"), ["user", "item"])


@pytest.mark.parametrize("rows", [1, 2, 100_000])
def test_ids_in_json(tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distrec.data.importers.jsonlines._ROWS", rows)
    path = tmp_path / "x.jsonl"
    for words, ids in {
        '1 "1" 1.0 "a"': ["1", "1", "1", "a"], '1.0 "1"': ["1", "1"], "1 1.0 2": [1, 1, 2], "1e3 5": [1000, 5],
    }.items():  # fmt: skip
        assert read_ids(log(path, words), "user").to_pylist() == ids
    for words, message in {
        '1 NaN "a"': r"row 1 \(line 2\): user is empty",
        "1 NaN": "row 1 .*: user is empty",
        '"a" true': r"row 1 \(line 2\): user is true, not an id",
        "1 false": "row 1 .*: user is false, not an id",
        "true": "row 0 .*: user is true, not an id",
        '1 "a" Infinity': "row 2 .*: user is Infinity, not an id",
        "1 -Infinity": "row 1 .*: user is -Infinity, not an id",
        '1.5 "a"': "row 0 .*: user is 1.5, a fractional id",
        "1e999": "row 0 .*: user is Infinity, not an id",
    }.items():
        with pytest.raises(InputError, match=message):
            read_ids(log(path, words), "user")


@pytest.mark.parametrize("rows", [1, 100_000])
def test_numbers_in_texts_of_json(tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distrec.data.importers.jsonlines._ROWS", rows)
    lines = ['{"t": 2000.0}', '{"t": "x"}', '{"t": NaN}', '{"t": 0.5}', '{"t": [NaN, 3.0]}']
    for count, expected in {4: ["2000", "x", None, "0.5"], 5: ["2000", "x", None, "0.5", "3"]}.items():
        assert strings(read(tmp_path / "x.jsonl", "\n".join(lines[:count]), ["t"]), "t").to_pylist() == expected


@pytest.mark.parametrize("array", ['[{"u": 1}, {"u": 2}]', '\n[\n{"u": 1},\n{"u": 2}\n]', "[]", "  [ {"])
def test_one_array_is_not_lines(tmp_path: Path, array: str) -> None:
    with pytest.raises(InputError, match=r"'x\.json' is one JSON array; write one object on each line"):
        read(tmp_path / "x.json", array, ["u"])


def test_rows_after_a_gap_are_named_without_a_python_number_for_each(tmp_path: Path) -> None:
    found = read(tmp_path / "x.json", '{"u": 1}\n\n{"u": 2}\n', ["u"])
    (tmp_path / "x.csv").write_text("u,i\n1,2\nbad\n3,4\n")
    options = TableFiles(files=[], bad_rows="drop")
    dropped = read_delimited(str(tmp_path / "x.csv"), form("x.csv", options, "k"), ["u"])
    assert (found.at(1), dropped.at(1)) == ("'x.json' row 1 (line 3)", "'x.csv' row 2 (line 4)")
    for numbers in (found.spans[0].lines, dropped.spans[0].rows, dropped.spans[0].lines):
        assert isinstance(numbers, array)
        assert numbers.itemsize == 8
