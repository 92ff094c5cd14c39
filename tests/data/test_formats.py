"""Raw files as people have them: of RecBole, Amazon and Book-Crossing, compressed, in other encodings, broken."""

from __future__ import annotations

import gzip
import json
import os
import sqlite3
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distrec.data.check import check
from distrec.data.dataset import Dataset
from distrec.data.prepare import prepare
from distrec.errors import InputError
from tests.data.imported import refuse, tables
from tests.data.raw import SOURCE, config, interactions, original_rows, prepared


def pairs(users: int = 12, items: int = 9, each: int = 5, seed: int = 0) -> list[tuple[int, int, int]]:
    """Rows (user, item, number within the user), five of each user."""
    rng = np.random.default_rng(seed)
    return [(u, int(i), k) for u in range(users) for k, i in enumerate(rng.permutation(items)[:each])]


def put(path: Path, text: str | bytes, packed: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if packed else data)


def made(tmp: Path, importer: dict[str, Any], out: str = "out", split: str = "leave_last_out") -> Dataset:
    dataset = prepared(tmp, importer, out=out, split={"name": split}, keep_items="all")
    check(str(tmp / out))
    return dataset


def texts_of(dataset: Dataset) -> dict[str, str | None]:
    names = dataset.items_table()["original"].to_pylist()
    return {names[row["item"]]: row["text"] for batch in dataset.content(["text"]) for row in batch.to_pylist()}


def ids_of(dataset: Dataset) -> list[str]:
    return dataset.items_table()["original"].to_pylist()


# --- RecBole -----------------------------------------------------------------------------------------------------


def recbole(tmp: Path, unknown: bool = False) -> None:
    """A folder in the form of RecBole's ml-100k."""
    rows = [f"{u + 1}\t{i + 1}\t{k % 5 + 1}\t{881250949 + 10 * k}" for u, i, k in pairs()]
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    put(tmp / "raw/ml-100k.inter", "\n".join([head, *rows]) + "\n")
    items = [f'{i + 1}\t"Film" {i + 1}\t199{i}\tComedy "Drama' for i in range(unknown, 9)]
    head = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
    put(tmp / "raw/ml-100k.item", "\n".join([head, *items]) + "\n")
    head = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"
    put(tmp / "raw/ml-100k.user", "\n".join([head, *(f"{u + 1}\t24\tM\ttechnician\t85711" for u in range(12))]) + "\n")


def test_a_folder_of_recbole(tmp_path: Path) -> None:
    recbole(tmp_path)
    importer = {"name": "recbole", "dataset": "ml-100k", "title": "movie_title", "text": "{movie_title}. {class}"}
    dataset = made(tmp_path, importer)
    assert (dataset.users, dataset.items, sum(dataset.manifest.interactions.values())) == (12, 9, 60)
    assert set(original_rows(dataset)) >= {("1", str(pairs()[4][1] + 1), 881250989, "test")}
    assert dataset.items_table()["title"].to_pylist()[0] == '"Film" 1'
    assert texts_of(dataset)["3"] == '"Film" 3. Comedy "Drama'
    table = {"files": "ml-100k.inter", "user": "user_id", "item": "item_id", "timestamp": "timestamp"}
    items = {"files": "ml-100k.item", "id": "item_id", "title": "movie_title", "text": "{movie_title}. {class}"}
    again = made(tmp_path, {"interactions": table, "items": items}, out="tables")
    assert (original_rows(again), texts_of(again)) == (original_rows(dataset), texts_of(dataset))
    for key in ({"dataset": "ml-1m"}, {"text": "{name}"}):
        with pytest.raises(InputError, match=r"no file 'ml-1m.inter'|has no column 'name'"):
            made(tmp_path, {**importer, **key}, out="refused")
    (tmp_path / "raw/ml-100k.item").unlink()
    assert made(tmp_path, {"name": "recbole", "dataset": "ml-100k"}, out="alone").items == 9
    with pytest.raises(InputError, match=r"key 'importer.title' needs the file 'ml-100k.item'"):
        made(tmp_path, importer, out="refused")


@pytest.mark.parametrize("way", ["recbole", "tables"])
def test_unknown_items(tmp_path: Path, way: str, capsys: pytest.CaptureFixture[str]) -> None:
    recbole(tmp_path, unknown=True)
    count = sum(i == 0 for _, i, _ in pairs())
    first = next(row for row, (_, i, _) in enumerate(pairs()) if i == 0)

    def importer(**unknown: str) -> dict[str, Any]:
        if way == "recbole":
            return {"name": "recbole", "dataset": "ml-100k", "text": "{movie_title}", **unknown}
        table = {"files": "ml-100k.inter", "user": "user_id", "item": "item_id", "timestamp": "timestamp", **unknown}
        images = {"image": "{item_id}.png"}
        put(tmp_path / "raw/2.png", "picture")
        np.save(tmp_path / "raw/f.npy", np.ones((8, 3)))
        items = {"files": "ml-100k.item", "id": "item_id", "text": "{movie_title}", **images}
        return {"interactions": table, "items": items, "features": {"f": {"files": "f.npy"}}}

    section = "importer" if way == "recbole" else "importer.interactions"
    expected = (
        rf"'ml-100k.inter' row {first} \(line {first + 2}\): item_id 1 is not among the 8 items of 'ml-100k.item'; "
        rf"{count} of 60 rows have unknown items \(1: 1\); add them there, "
        rf"or set '{section}.unknown_items: drop' or 'keep'"
    )
    with pytest.raises(InputError, match=expected):
        made(tmp_path, importer(), out="refused")
    capsys.readouterr()
    dropped = made(tmp_path, importer(unknown_items="drop"), out="drop")
    assert f"note      dropped {count} of 60 rows of 'ml-100k.inter', whose 1 items are" in capsys.readouterr().out
    assert (dropped.items, sum(dropped.manifest.interactions.values())) == (8, 60 - count)
    kept = made(tmp_path, importer(unknown_items="keep"), out="keep")
    assert f"note      kept {count} of 60 rows" in capsys.readouterr().out
    assert (kept.items, sum(kept.manifest.interactions.values())) == (9, 60)
    assert {key: text for key, text in texts_of(kept).items() if text is None} == {"1": None}
    if way == "tables":
        _, missing = kept.feature_rows("f", 0, 9)
        assert [key for key, gone in zip(ids_of(kept), missing) if gone] == ["1"]
        assert kept.manifest.content["image"] == 1


# --- Amazon ------------------------------------------------------------------------------------------------------


def amazon(tmp: Path) -> None:
    """Reviews and metadata in the form of the Amazon reviews of 2023."""
    reviews = [
        {
            "rating": float(k % 5 + 1), "title": 'A "nice" one', "text": "two\nlines, \u201cquoted\u201d", "images": [],
            "asin": f"B0{i:03d}X", "parent_asin": f"B0{i:03d}", "user_id": f"AE{u}", "timestamp": 1588687728923 + k,
            "helpful_vote": 0, "verified_purchase": True,
        }
        for u, i, k in pairs()
    ]  # fmt: skip
    lines = "\n".join(json.dumps(row) for row in reviews)
    put(tmp / "raw/reviews.jsonl.gz", lines + "\n", packed=True)
    meta = [
        {
            "main_category": "All Beauty" if i else None, "title": f"Item {i}", "average_rating": 4.8,
            "features": ["Soft", "Blue"],
            "description": [[], ["One.", "Two."]][i % 2], "price": [None, "29.99", 12.5][i % 3],
            "images": [{"thumb": "https://x/y.jpg", "variant": "MAIN"}], "videos": [], "store": None,
            "categories": [["A", "B"]], "details": {"Size": "1 x 2", f"Key {i}": i}, "parent_asin": f"B0{i:03d}",
        }
        for i in range(9)
    ]  # fmt: skip
    put(tmp / "raw/meta.jsonl.gz", "\n".join(json.dumps(row) for row in meta), packed=True)


def test_amazon_style_json_lines(tmp_path: Path) -> None:
    amazon(tmp_path)
    table = {
        "files": "reviews.jsonl.gz", "user": "user_id", "item": "parent_asin", "rating": "rating",
        "timestamp": "timestamp",
    }  # fmt: skip
    text = "{title}. {description}. {features}. {price}. {categories}"
    items = {"files": "meta.jsonl.gz", "id": "parent_asin", "title": "title", "text": text}
    dataset = made(tmp_path, {"interactions": table, "items": items})
    u, i, k = pairs()[4]
    assert (f"AE{u}", f"B0{i:03d}", 1588687728923 + k, "test") in original_rows(dataset)
    found = texts_of(dataset)
    assert found["B0001"] == "Item 1. One., Two.. Soft, Blue. 29.99. A, B"
    assert found["B0000"] == "Item 0. Soft, Blue. A, B"
    assert found["B0002"] == "Item 2. Soft, Blue. 12.5. A, B"
    for wrong, message in {
        "details": r"'meta.jsonl.gz' row 0 \(line 1\): details holds an object",
        "images": r"'meta.jsonl.gz' row 0 \(line 1\): images holds an object",
        "brand": r"'meta.jsonl.gz' has no key 'brand'; valid here: average_rating,",
    }.items():
        refuse(tmp_path, message, interactions=table, items={**items, "text": f"{{{wrong}}}"})
    refuse(
        tmp_path, "'importer.interactions.delimiter' does not apply to 'reviews.jsonl.gz', which is JSON lines",
        interactions={**table, "delimiter": ";"},
    )  # fmt: skip


# --- Book-Crossing, MovieLens and other text ----------------------------------------------------------------------


def test_a_book_crossing_like_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ratings = [f'"{u}";"{i:05d}X";"{k}"' for u, i, k in pairs()]
    put(tmp_path / "raw/ratings.csv", "\r\n".join(['"User-ID";"ISBN";"Rating"', *ratings, ""]))
    books = [f'"{i:05d}X";"Caf\xe9 \\"No. {i}\\" & more; again";"19{i}0"' for i in range(9)]
    books[4:4] = ['"99999X";"broken\\";Somebody"', '"1";"2";"3";"4"', '"88888X";"short"']
    put(tmp_path / "raw/books.csv", "\r\n".join(['"ISBN";"Title";"Year"', *books, ""]).encode("latin-1"))
    table = {"files": "ratings.csv", "user": "User-ID", "item": "ISBN", "rating": "Rating", "delimiter": ";"}
    items: dict[str, Any] = {"files": "books.csv", "id": "ISBN", "title": "Title", "text": "{Title} ({Year})"}
    importer = {"interactions": table, "items": items}
    for key, value, message in [
        ("delimiter", ";", r"'books.csv' line 2: byte 0xE9 is not UTF-8; set 'importer.items.encoding: latin-1'"),
        ("encoding", "latin-1", r"'books.csv' row 0 \(line 2\): .* is followed by other text"),
        (
            "quoting",
            "backslash",
            r"'books.csv' row 4 \(line 6\): 2 values for 3 columns; .*'importer.items.bad_rows: drop'",
        ),
    ]:
        items[key] = value
        with pytest.raises(InputError, match=message):
            made(tmp_path, importer, out="refused", split="per_user_random")
    items["bad_rows"] = "drop"
    capsys.readouterr()
    dataset = made(tmp_path, importer, split="per_user_random")
    assert dataset.items_table()["title"].to_pylist()[3] == 'Café "No. 3" & more; again'
    assert texts_of(dataset)["00008X"] == 'Café "No. 8" & more; again (1980)'
    assert "note      'books.csv': dropped 3 of 12 rows, which do not have 3 values: row 4 (line 6) with 2" in (
        capsys.readouterr().out
    )


def test_files_of_movielens_without_a_heading(tmp_path: Path) -> None:
    put(tmp_path / "raw/ratings.dat", "\n".join(f"{u}::{i}::{k}::{97830 + k}" for u, i, k in pairs()))
    put(
        tmp_path / "raw/movies.dat",
        "\n".join(f'{i}::"Am\xe9lie: {i}::Comedy|Drama' for i in range(9)).encode("latin-1"),
    )
    table = {"files": "ratings.dat", "delimiter": "::", "heading": ["u", "i", "r", "t"], **SOURCE}
    items = {
        "files": "movies.dat", "delimiter": "::", "heading": ["i", "title", "genres"], "encoding": "latin-1", "id": "i",
        "title": "title",
    }  # fmt: skip
    dataset = made(tmp_path, {"interactions": table, "items": items})
    assert dataset.items_table()["title"].to_pylist()[2] == '"Amélie: 2'
    refuse(tmp_path, r"'ratings.dat' row 0 \(line 1\): 4 values for 3 columns",
           interactions={**table, "heading": ["u", "i", "t"], "rating": None})  # fmt: skip
    refuse(tmp_path, "'ratings.dat' is not a table of a known kind; .* or set 'importer.interactions.delimiter'",
           interactions={**table, "delimiter": None})  # fmt: skip


@pytest.mark.parametrize(
    ("name", "encoding", "options"),
    [
        ("log.CSV", "utf-8", {}),
        ("log.csv.gz", "utf-8", {}),
        ("log.TSV.GZ", "utf-8", {}),
        ("log.csv", "utf-8-sig", {}),
        ("log.csv", "utf-16", {}),
        ("log.csv", "utf-16-le", {"encoding": "utf-16-le"}),
        ("log.csv", "cp1252", {"encoding": "cp1252"}),
        ("log.txt", "utf-8", {"delimiter": "|"}),
        ("log.csv", "utf-8", {"delimiter": "\t"}),
    ],
)
def test_text_in_other_forms(
    tmp_path: Path, name: str, encoding: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distrec.data.importers.text.BLOCK", 101)  # cuts characters
    mark = options.get("delimiter") or ("," if ".csv" in name.lower() else "\t")
    columns = interactions(seed=1)
    columns["u"] = np.array([f"é{u}" for u in columns["u"]])
    rows = [mark.join(map(str, row)) for row in zip(*columns.values())]
    put(
        tmp_path / "raw" / name, "\r\n".join([mark.join(columns), *rows]).encode(encoding), name.lower().endswith(".gz")
    )
    dataset = tables(tmp_path, interactions={"files": name, **SOURCE, **options})
    assert dataset.users_table()["original"].to_pylist().count("é5") == 1
    expected = {(u, str(i), int(t)) for u, i, _, t in zip(*columns.values())}
    assert {row[:3] for row in original_rows(dataset)} == expected


def test_files_that_are_no_text(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    rows = "u,i,r,t\n" + "".join(f"{u},{i},3,{k}\n" for u, i, k in pairs())
    put(folder / "rows.csv", rows)
    with zipfile.ZipFile(folder / "zip.csv", "w") as archive:
        archive.write(folder / "rows.csv", "rows.csv")
    put(folder / "packed.csv", rows, packed=True)
    put(folder / "plain.csv.gz", rows)
    put(folder / "cut.csv.gz", gzip.compress(rows.encode() * 9)[:-20])
    put(folder / "nul.csv", rows.replace("\n3,", "\n3\0,", 1))
    put(folder / "noise.csv", np.random.default_rng(0).bytes(5000))
    put(folder / "wide.csv", rows.encode("utf-16-le"))
    put(folder / "half.csv", rows.encode("utf-16")[:-1])
    put(folder / "latin.csv", rows.replace("\n5,", "\n5\xe9,", 1).encode("latin-1"))
    put(folder / "tail.csv", rows.encode() + b"\xc3")
    sqlite3.connect(folder / "data.csv").execute("create table a (b)").connection.close()
    put(folder / "semicolons.csv", rows.replace(",", ";"))
    put(folder / "huge.csv", rows.replace(",3,", f",{'9' * 5000},", 1))
    put(folder / "blank.csv", "\n\n\r\n")
    for name, message in {
        "zip.csv": "is a ZIP archive, not text; give plain text",
        "packed.csv": "is compressed with gzip, not text; end its name in .gz",
        "plain.csv.gz": r"is not readable as gzip \(Not a gzipped file",
        "cut.csv.gz": "is not readable as gzip",
        "nul.csv": "has a NUL byte in line 17",
        "noise.csv": "line 1: byte 0x.. is not UTF-8",
        "wide.csv": "has a NUL byte in line 1, .* set 'importer.interactions.encoding: utf-16-le'",
        "half.csv": "line 61: byte .* is not UTF-16",
        "latin.csv": "line 27: byte 0xE9 is not UTF-8",
        "tail.csv": "line 62: byte 0xC3 is not UTF-8",
        "data.csv": "is an SQLite database",
        "semicolons.csv": "has no column 'u' but a single one, 'u;i;r;t'; set 'importer.interactions.delimiter' to ';'",
        "huge.csv": r"'huge.csv' row 0 \(line 2\): r is inf; give a finite number",
        "blank.csv": "is empty",
    }.items():
        refuse(tmp_path, message, interactions={"files": name, **SOURCE})
    for key, value, message in [
        ("encoding", "latin-9000", "is 'latin-9000' but is not a text encoding"),
        ("encoding", "base64", "is 'base64' but is not a text encoding"),
        ("delimiter", "", "must be at least one character"),
        ("delimiter", "\n", "hold no quote, backslash or line break"),
        ("heading", ["u", "i", "u"], "names 'u' twice"),
        ("heading", [], r"is \[\] but must have at least 1 entry"),
        ("quoting", "sometimes", "must be 'standard', 'backslash' or 'none'"),
    ]:
        refuse(tmp_path, message, interactions={"files": "rows.csv", **SOURCE, key: value})
    refuse(tmp_path, "'importer.interactions.quoting' is 'standard' but the delimiter '::'",
           interactions={"files": "rows.csv", **SOURCE, "delimiter": "::", "quoting": "standard"})  # fmt: skip


# --- names -------------------------------------------------------------------------------------------------------


def test_names_stay_inside_the_source_and_links_are_followed(tmp_path: Path, raw: dict) -> None:
    folder = tmp_path / "raw"
    (tmp_path / "else").mkdir()
    (folder / "interactions.parquet").rename(tmp_path / "else/a.parquet")
    (folder / "year/2020").mkdir(parents=True)
    os.symlink(tmp_path / "else/a.parquet", folder / "year/2020/log.parquet")
    os.symlink(tmp_path / "else", folder / "linked")
    os.symlink("loop.csv", folder / "loop.csv")
    os.symlink("nowhere", folder / "gone.csv")
    os.mkfifo(folder / "pipe.csv")
    (folder / "year/file.txt").touch()
    for name in ("year/2020/log.parquet", "linked/a.parquet", "./linked/a.parquet", "ye*/*/*.parquet", "*/a.parquet"):
        dataset = tables(tmp_path, out=name.replace("/", "-"), interactions={"files": name, **SOURCE})
        assert dataset.users == 40
    for name, message in {
        "../else/a.parquet": "'../else/a.parquet' is not a name inside the source .*without '..'",
        "year/../../else/a.parquet": "is not a name inside the source",
        str(tmp_path / "else/a.parquet"): "is not a name inside the source",
        "": "'' is not a name inside the source",
        ".": "'.' is not a name inside the source",
        "year": r"'year' is a folder; name its files, for example 'year/\*'",
        "*/2020": "'year/2020' is a folder",
        "loop.csv": "'loop.csv' cannot be read \\(Too many levels of symbolic links\\)",
        "gone.csv": "'gone.csv' cannot be read \\(No such file",
        "pipe.csv": "'pipe.csv' is a device or pipe",
        "*/x.csv": r"no file '\*/x.csv' .*; no 'x.csv' in 'linked' and others, valid here: 2020, a.parquet, file.txt",
        "years/x.csv": "no file 'years/x.csv' in source .*did you mean 'year'",
        "pipe.csv/x.csv": "no file 'pipe.csv/x.csv' .*'pipe.csv' is not a folder",
    }.items():
        refuse(tmp_path, message, interactions={"files": name, **SOURCE})
    items = {"files": "items.parquet", "id": "i", "image": "../else/{i}.png"}
    table = {"files": "linked/a.parquet", **SOURCE}
    refuse(tmp_path, "'../else' is not a name inside the source", interactions=table, items=items)
    refuse(tmp_path, "'importer.interactions.encoding' does not apply to 'linked/a.parquet', which is Parquet",
           interactions={**table, "encoding": "latin-1"})  # fmt: skip
    path = config(tmp_path / "data.yaml", {"interactions": table})
    for name, message in {"items.parquet": "is a file", "loop.csv": "does not exist"}.items():
        with pytest.raises(InputError, match=message):
            prepare(str(path), str(folder / name), str(tmp_path / "refused"))


# --- quotation marks around ids --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["log.tsv", "log.inter", "log.dat"])
@pytest.mark.parametrize(("marked", "column"), [([7], "u"), ([0, 1], "i"), (range(1, 45), "u")])
def test_ids_of_which_some_are_in_quotation_marks(
    tmp_path: Path, name: str, marked: Sequence[int], column: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = "::" if name == "log.dat" else "\t"
    rows = [{"u": str(u), "i": str(i), "r": "3", "t": str(k)} for u, i, k in pairs()]
    options = {"files": name, **SOURCE} | ({"delimiter": mark} if name == "log.dat" else {})
    for row in marked:
        rows[row][column] = f'"{rows[row][column]}"'

    def put_rows() -> None:
        put(tmp_path / "raw" / name, "\n".join(mark.join(row) for row in [list("uirt"), *(r.values() for r in rows)]))

    put_rows()
    few = 2 * len(marked) <= len(rows)
    odd = min(marked) if few else next(n for n in range(len(rows)) if n not in marked)
    count = len(rows) - len(marked) if few else len(marked)
    remedy = "write all of them without marks" if mark == "::" else "set 'importer.interactions.quoting: standard'"
    message = rf"row {odd} \(line {odd + 2}\): {column} is {rows[odd][column]}, but {count} of {len(rows)} ids are "
    refuse(tmp_path, f"{message}{'not ' * few}in quotation marks; {remedy}", interactions=options)
    for row in rows:
        row[column] = f'"{row[column].strip(chr(34))}"'
    put_rows()
    tables(tmp_path, interactions=options)
    assert "begin and end with a quotation mark" in capsys.readouterr().out


def test_no_files_are_refused(tmp_path: Path, raw: dict) -> None:
    refuse(tmp_path, "key 'importer.interactions.files' is empty; name at least one file", interactions={"files": []})
