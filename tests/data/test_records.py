"""Records of delimited text: found as a character-by-character reader finds them, whatever the cuts between blocks."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distrec.data.importers.delimited import column_names, read_delimited
from distrec.data.importers.formats import Form, TableFiles, form
from distrec.data.importers.records import blocks_of_records
from distrec.errors import InputError

MALFORMED = "malformed"


def shape(name: str = "x.csv", **options: Any) -> Form:
    return form(name, TableFiles(files=[name], **options), "importer.interactions")


def plainly(text: str, quoting: str) -> list[list[str]] | str:
    """The records of comma-separated text, read one character at a time; `MALFORMED` for a bad quotation mark."""
    records: list[list[str]] = []
    values: list[str] = []
    value, started, at = "", False, 0
    while at < len(text):
        mark = text[at]
        if mark in "\r\n":
            if started or values:
                records.append([*values, value])
            values, value, started, at = [], "", False, at + 1
        elif mark == ",":
            values, value, started, at = [*values, value], "", False, at + 1
        elif mark == '"' and not started and quoting != "none":
            started, at = True, at + 1
            while True:
                if at >= len(text):
                    return MALFORMED
                if quoting == "backslash" and text[at] == "\\" and at + 1 < len(text):
                    value, at = value + text[at + 1], at + 2
                elif text[at : at + 2] == '""':
                    value, at = value + '"', at + 2
                elif text[at] == '"':
                    at += 1
                    break
                else:
                    value, at = value + text[at], at + 1
            if at < len(text) and text[at] not in ",\r\n":
                return MALFORMED
        elif mark == "\\" and quoting == "backslash" and at + 1 < len(text):
            value, started, at = value + text[at + 1], True, at + 2
        else:
            value, started, at = value + mark, True, at + 1
    if started or values:
        records.append([*values, value])
    return records


def pieces(data: bytes, rng: np.random.Generator) -> list[bytes]:
    cuts = np.sort(rng.integers(0, len(data) + 1, rng.integers(0, 6)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])]


@pytest.mark.parametrize("quoting", ["standard", "backslash", "none"])
def test_records_are_those_of_a_plain_reader(tmp_path: Path, quoting: str) -> None:
    rng = np.random.default_rng(len(quoting))
    alphabet = list('aé"",\n\r') + ["\r\n", "a", '"a"', ',"', '",'] + (["\\"] if quoting == "backslash" else [])
    outcomes = {"read": 0, MALFORMED: 0}
    for _ in range(3000):
        text = "".join(rng.choice(alphabet, rng.integers(0, 14)))
        expected = plainly(text, quoting)
        if quoting == "backslash" and text.endswith("\\"):
            continue  # half of an escape
        how = shape(quoting=quoting, heading=["only"])
        try:
            blocks = list(blocks_of_records(pieces(text.encode(), rng), how))
        except InputError:
            assert expected == MALFORMED, text
            outcomes[MALFORMED] += 1
            continue
        assert expected != MALFORMED, text
        counts = [int(count) for block in blocks for count in block.values]
        assert counts == [len(record) for record in expected], text
        lines = [line for block in blocks for line in block.lines.tolist()]
        data = [block.record(i) for block in blocks for i in range(len(block))]
        where = [len(before.replace("\r\n", "\n").replace("\r", "\n").split("\n")) for before in _before(text, data)]
        assert lines == where, text
        outcomes["read"] += 1
    assert outcomes["read"] > 500
    assert quoting == "none" or outcomes[MALFORMED] > 500


def _before(text: str, records: list[bytes]) -> list[str]:
    """The text before each record."""
    found, at, data = [], 0, text.encode()
    for record in records:
        at = data.index(record, at)
        found.append(data[:at].decode())
        at += len(record)
    return found


@pytest.mark.parametrize("size", [7, 64, 1 << 24])
@pytest.mark.parametrize("seed", range(3))
def test_what_python_writes_is_read_back(tmp_path: Path, seed: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distrec.data.importers.text.BLOCK", size)
    rng = np.random.default_rng(seed)
    words = ["", "plain", 'a "quoted" word', "a, b", "two\nlines", "x\r\ny", '5" disk', "é", '"', " spaced "]
    rows = [[str(i), *rng.choice(words, 2)] for i in range(60)]
    out = io.StringIO()
    csv.writer(
        out, lineterminator=["\n", "\r\n", "\r"][seed], quoting=csv.QUOTE_ALL if seed else csv.QUOTE_MINIMAL
    ).writerows([["key", "one", "two"], *rows])
    path = tmp_path / "x.csv"
    path.write_bytes(out.getvalue().encode())
    assert column_names(str(path), shape()) == ["key", "one", "two"]
    found = read_delimited(str(path), shape(), ["two", "key"])
    assert found.table["two"].to_pylist() == [row[2] or None for row in rows]
    assert found.table["key"].to_pylist() == [row[0] for row in rows]
    assert found.at(59).startswith("'x.csv' row 59 (line ")


ROWS = [f"{u},{i},5,head" for u in range(6) for i in range(4)]


def lines(**changed: str) -> str:
    """A heading and 24 rows, some of them replaced: `r3="…"`."""
    return "\n".join(["user,item,rating,words", *(changed.get(f"r{n}", row) for n, row in enumerate(ROWS))]) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            lines(r5='1,1,5,"Best ever', r9='2,1,5,"Best ever'),
            r"row 5 \(line 7\): .* is followed by other text; double",
        ),
        (lines(r5='1,1,5,"Best ever'), r"row 5 \(line 7\): .* is missing; double"),
        (lines(r5='1,1,5,"Best" ever'), r"row 5 \(line 7\): .* is followed by other text"),
        (lines(r23='5,3,5,"'), r"row 23 \(line 25\): .* is missing"),
        (lines(r0='"0,0,5,head'), r"row 0 \(line 2\)"),
        (lines(r5='1,1,5,"Best ever', r9='2,1,5,ever best"'), r"row 5 \(line 7\): .* looks like 4 more rows"),
        (lines(r5='1,1,5,"Best ever', r6='1,2,5,ever best"'), r"row 5 \(line 7\): .* looks like 1 more row;"),
        (lines(r4="1,0,5"), r"row 4 \(line 6\): 3 values for 4 columns"),
        (lines(r4="1,0,5,a,b", r7="1"), r"row 4 \(line 6\): 5 values for 4 columns"),
        ('user,"item\n1,2\n', "heading: a value begins"),
        ("user,item,words,words\n1,2,3,4\n", "two columns named 'words'"),
    ],
)
@pytest.mark.parametrize("size", [16, 1 << 24])
def test_bad_rows_are_refused_with_their_place(
    tmp_path: Path, text: str, message: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distrec.data.importers.text.BLOCK", size)
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_delimited(str(path), shape(), ["user", "item"])
    assert "\n" not in str(caught.value)


def test_rows_in_quotes_are_counted_against_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(lines(r5='1,1,5,"one, two\nthree, four, five\nsix"', r9='2,1,5,"a\n\nb"'))
    found = read_delimited(str(path), shape(), ["user", "words"])
    assert found.table.num_rows == 24
    assert found.notes == [
        "'x.csv': 28 lines make 24 rows, because quoted values in 2 of them contain line breaks (longest: 3 lines, "
        "row 5)"
    ]
    assert [found.at(row) for row in (5, 6, 10)] == [
        "'x.csv' row 5 (line 7)", "'x.csv' row 6 (line 10)", "'x.csv' row 10 (line 16)",
    ]  # fmt: skip


@pytest.mark.parametrize("size", [16, 1 << 24])
def test_bad_rows_can_be_dropped(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distrec.data.importers.text.BLOCK", size)
    path = tmp_path / "x.csv"
    path.write_text(lines(**{f"r{n}": "1,0,5" for n in (0, 4, 7, 8, 20)}))
    found = read_delimited(str(path), shape(bad_rows="drop"), ["user", "item"])
    assert found.table.num_rows == 19
    assert found.at(1) == "'x.csv' row 2 (line 4)"
    assert found.at(3) == "'x.csv' row 5 (line 7)"
    assert found.notes == [
        "'x.csv': dropped 5 of 24 rows, which do not have 4 values: row 0 (line 2) with 3 values, row 4 (line 6) with "
        "3 values, row 7 (line 9) with 3 values, …"
    ]


def test_quotation_marks_are_text_in_tabbed_files(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text('user\twords\n1\t"Best ever\n2\tok\n3\t"Best" ever\n4\t"all"\n')
    found = read_delimited(str(path), shape("x.tsv"), ["user", "words"])
    assert found.table["words"].to_pylist() == ['"Best ever', "ok", '"Best" ever', '"all"']
    (note,) = found.notes
    assert note.startswith("'x.tsv': 1 values begin and end with a quotation mark")
    assert "'importer.interactions.quoting: standard'" in note
    standard = shape("x.tsv", quoting="standard")
    with pytest.raises(InputError, match=r"row 0 \(line 2\)"):
        read_delimited(str(path), standard, ["user"])
    path.write_text('user\twords\n1\t"a\tb"\n')
    assert read_delimited(str(path), standard, ["words"]).table["words"].to_pylist() == ["a\tb"]
    with pytest.raises(InputError, match=r"row 0 \(line 2\): 3 values for 2 columns"):
        read_delimited(str(path), shape("x.tsv"), ["words"])


def test_messages_stay_short_and_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('a,"b\nc",' + "d" * 5000 + ",e\n1,2,3,4\n")
    with pytest.raises(InputError, match=r"has no column 'user'; valid here: a, b\\nc, d") as caught:
        read_delimited(str(path), shape(), ["user"])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


# --- quotation marks that join rows ---------------------------------------------------------------------------------


def stray(columns: list[str], at: int, first: int, last: int) -> str:
    """A table of 40 rows without numbers; a stray mark opens in row `first`, and one closes in row `last`."""
    rows = [["ok" if c == "note" else f"{c}-{n % 7}" for c in columns] for n in range(40)]
    rows[first][at], rows[last][at] = '"Best lamp ever', 'it is 12"'
    return "\n".join(",".join(row) for row in [columns, *rows]) + "\n"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("width", [2, 3, 4, 6])
def test_rows_that_stray_marks_join_are_refused_whatever_they_hold(tmp_path: Path, width: int, end: str) -> None:
    columns = ["user", "item", "day", "shop", "till", "till2"][: width - 1]
    for at in range(width):
        for first, last in [(3, 30), (0, 39), (5, 7), (8, 9)]:
            text = stray([*columns[:at], "note", *columns[at:]], at, first, last)
            (tmp_path / "x.csv").write_text(text.replace("\n", end), newline="")
            plural = "s" if last - first > 1 else ""
            message = rf"row {first} \(line {first + 2}\): .* looks like {last - first} more row{plural}; double each"
            with pytest.raises(InputError, match=message) as caught:
                read_delimited(str(tmp_path / "x.csv"), shape(), ["user"])
            for remedy in ("none' if it is text", "standard' if the value really has several lines"):
                assert f"'importer.interactions.quoting: {remedy}" in str(caught.value)
            sure = read_delimited(str(tmp_path / "x.csv"), shape(quoting="standard"), ["note"])
            assert sure.table.num_rows == 40 - (last - first)
            assert "contain line breaks" in sure.notes[0]


@pytest.mark.parametrize(
    ("text", "joined"),
    [
        ('user,item,n\na,b,"x\nc,d,N/A\ne,f,5\ng,h,y"\n', True),  # a number is missing
        ('user,item,note\na,b,"x\nc,d,one, two\ne,f,ok\ng,h,y"\n', True),  # one of two lines has a comma more
        ('user,item,note\na,b,"x\n\nc,d,ok\n\ne,f,ok\ng,h,y"\n', True),  # empty lines are no rows
        ('user,item,day\ni1,"Big lamp,2020-01-02\ni2,12",2020-01-03\n', True),
        ('user,item,a,b\nx,"A",y,z\nx,y,"A",B\nx,"A, b",y,"Z\nx,y,z,z"\n', True),  # behind a quoted comma
        ('user,item,note\na,b,"Dear all,\n\nthis is it.\nYours, truly"\n', False),
        ('user,item,note\na,b,"one, two\nthree, four"\n', False),
        ('user,item,note\na,b,"one\nthree, four, five\nsix\nseven\neight"\n', False),
        ('item\n"one, two\nthree\nfour, five"\n', False),
        ('user,item,note\na,"one, two\nthree",b\n', False),
        ('user,item,note\n"one\ntwo","three\nfour","five\nsix"\n', False),
    ],
)
def test_what_looks_like_rows_and_what_does_not(tmp_path: Path, text: str, joined: bool) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text)
    if joined:
        with pytest.raises(InputError, match="looks like"):
            read_delimited(str(path), shape(), ["user"])
    else:
        read_delimited(str(path), shape(), ["item"])


def test_escaped_line_breaks_are_meant(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    for text, fine in {'user,item\na,"x\\\nb,y"\n': True, 'user,item\na,"x\nb,y"\n': False}.items():
        path.write_text(text)
        if fine:
            found = read_delimited(str(path), shape(quoting="backslash"), ["item"])
            assert found.table["item"].to_pylist() == ["x\nb,y"]
        else:
            with pytest.raises(InputError, match="or write a backslash before each of its line breaks if the value"):
                read_delimited(str(path), shape(quoting="backslash"), ["item"])


@pytest.mark.parametrize("quoting", [None, "standard"])
def test_rows_that_a_mark_joins_are_never_dropped_as_one(tmp_path: Path, quoting: str | None) -> None:
    path = tmp_path / "x.csv"
    path.write_text(lines(r5='1,"Best,5,ever', r9='2,1,5,it is 12"', r12="1,2"))
    options = {"bad_rows": "drop"} | ({} if quoting is None else {"quoting": quoting})
    message = r"row 5 \(line 7\): 2 values for 4 columns, in 5 lines that a quotation mark joins; double each"
    with pytest.raises(InputError, match=message):
        read_delimited(str(path), shape(**options), ["user"])


def test_escaped_marks_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('user,item\n1,"a \\"b\\" c"\n')
    message = r"set 'importer.interactions.quoting: backslash' if \\\" is a quotation mark inside a value"
    with pytest.raises(InputError, match=message):
        read_delimited(str(path), shape(), ["user"])
    assert read_delimited(str(path), shape(quoting="backslash"), ["item"]).table["item"].to_pylist() == ['a "b" c']


# --- headings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["user,item,day", "User, item ,DAY", "item,user,day", "user,item,", "u,i,d"])
def test_a_second_heading_is_refused(tmp_path: Path, first: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(f"{first}\n1,2,3\n")
    given = ["u", "i", "d"] if first == "u,i,d" else ["user", "item", "day"]
    message = "key 'importer.interactions.heading' names the columns, but so does the first line of 'x.csv'"
    with pytest.raises(InputError, match=message):
        read_delimited(str(path), shape(heading=given), given[:2])
    path.write_text("user,1,item\n1,2,3\n")
    assert read_delimited(str(path), shape(heading=given), given[:2]).table.num_rows == 2


def test_columns_are_named_with_or_without_their_type(tmp_path: Path) -> None:
    path = tmp_path / "x.inter"
    path.write_text("user_id:token\titem_id:token\n1\t2\n")
    wanted = ["user_id:token", "user_id", "item_id"]
    assert read_delimited(str(path), shape("x.inter"), wanted).table.to_pydict() == {
        "user_id:token": ["1"], "user_id": ["1"], "item_id": ["2"],
    }  # fmt: skip
    typed = read_delimited(str(path), shape("x.inter", heading=["a:token", "b:token"]), ["a", "b:token"])
    assert typed.table["b:token"].to_pylist() == ["item_id:token", "2"]
    path = tmp_path / "x.csv"
    path.write_text("user:token,item,Book: Title\n1,2,3\n")
    found = read_delimited(str(path), shape(), ["user:token", "item:token", "Book: Title"])
    assert found.table.num_columns == 3
    with pytest.raises(InputError, match="has no column 'user'; did you mean 'user:token'"):
        read_delimited(str(path), shape(), ["user"])
