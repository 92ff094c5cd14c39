"""Texts and images that importers read from a source, and how `prepare` stores them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from distrec.data.check import check
from distrec.data.dataset import Dataset
from distrec.data.importers.content import parse_template, strings, texts
from distrec.data.importers.source import Rows
from distrec.data.pictures import shrunk
from distrec.errors import InputError
from tests.data.imported import ITEMS, original, refuse, tables
from tests.data.raw import SOURCE, interactions, prepared, write

# --- texts -------------------------------------------------------------------------------------------------------


def test_text_template() -> None:
    table = pa.table(
        {
            "title": ["Heat", None, "  Up ", None, "Her"],
            "genres": [["Crime", "Drama"], ["Comedy"], [], None, ["Romance"]],
            "year": [1995, 2000, None, None, 2013],
            "plot": ["A thief.", "A joke.", "A house.", "", "A voice."],
            "good": [True, None, True, True, False],
        }
    )
    rows = Rows(table, [("items.parquet", 5)], typed=True)
    template = "{title}. Genres: {genres}. ({year}) {plot}"
    assert texts(rows, template, {}).to_pylist() == [
        "Heat. Genres: Crime, Drama. (1995) A thief.",
        "Genres: Comedy. (2000) A joke.",
        "Up) A house.",
        None,
        "Her. Genres: Romance. (2013) A voice.",
    ]
    assert texts(rows, "{title}. {plot}", {"plot": "good"}).to_pylist() == [
        "Heat. A thief.",
        None,
        "Up. A house.",
        None,
        "Her",
    ]
    assert texts(rows, "Film: {title}!", {}).to_pylist() == ["Film: Heat!", None, "Film: Up!", None, "Film: Her!"]
    for bad in ("no column", "{", "}", "{}", "{ }", "{a{b}}", "{title", "title}", "{{title}}", ""):
        with pytest.raises(ValueError, match=r"."):
            parse_template(bad)


def test_names_of_columns_in_templates() -> None:
    for column in ("title:token_seq", "Book: Title", "Title!", "a!r", "a:>9", "x[0]", "x.y"):
        assert parse_template(f"In {{{{{{{column}}}}}}}, all") == [("In {", column), ("}, all", None)]
    rows = Rows(pa.table({"a": ["x", None], "b": ["y", None]}), [("items.parquet", 2)], typed=True)
    assert texts(rows, "{{{a}}} and {{{b}}}", {}).to_pylist() == ["{x} and {y}", None]
    for template, message in {
        "{a": "has a brace that is not closed", "a}": "has a brace that closes nothing", "{}": "must name a column",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            parse_template(template)


def test_texts_of_a_csv_become_content(tmp_path: Path, raw: dict) -> None:
    lines = [f'{i},{i:04d},"a ""quoted"", long\ntext"' for i in raw["items"]]
    (tmp_path / "raw/items.csv").write_text("\n".join(["i,code,words", *lines]) + "\n")
    items = {"files": "items.csv", "id": "i", "text": "{code}: {words}"}
    dataset = tables(tmp_path, items=items)
    found = {row["item"]: row["text"] for batch in dataset.content(["text"]) for row in batch.to_pylist()}
    ids = original(dataset)
    assert found == {index: f'{i:04d}: a "quoted", long\ntext' for index, i in enumerate(ids)}
    assert dataset.manifest.content == {"text": len(ids), "image": 0}
    check(str(tmp_path / "out"))
    refuse(tmp_path, "names 'plot', which the text does not use",
           items={**items, "text_only_if": {"plot": "code"}})  # fmt: skip
    refuse(tmp_path, "column 'words' holds string; a condition must be true or false",
           items={**items, "text_only_if": {"code": "words"}})  # fmt: skip
    refuse(tmp_path, "'items.csv' has no column 'word'; did you mean 'words'", items={**items, "text": "{word}"})
    refuse(tmp_path, "key 'importer.items.text' is '{' but", items={**items, "text": "{"})


LISTS: dict[str, pa.DataType] = {
    "list": pa.list_(pa.string()),
    "large list": pa.large_list(pa.large_string()),
    "list view": pa.list_view(pa.string()),
    "large list view": pa.large_list_view(pa.string()),
    "dictionary": pa.list_(pa.dictionary(pa.int8(), pa.string())),
}


def one_column(values: pa.Array) -> Rows:
    return Rows(pa.table({"c": values}), [("items.parquet", len(values))], typed=True)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", LISTS)
def test_lists_are_joined_without_nulls_and_blanks(kind: str, seed: int) -> None:
    dice = np.random.default_rng(seed)
    words = ["Toys", " Games ", "", "  ", None, None]
    lists = [
        None if dice.random() < 0.2 else [words[at] for at in dice.integers(0, 6, dice.integers(0, 5))]
        for _ in range(dice.integers(0, 30))
    ]
    wanted = [", ".join(word.strip() for word in row or [] if word and word.strip()) or None for row in lists]
    if kind == "dictionary":
        flat = pa.array([word for row in lists for word in row or []], pa.string()).dictionary_encode()
        ends = np.cumsum([0, *(len(row or []) for row in lists)])
        array = pa.ListArray.from_arrays(ends, flat, mask=pa.array([row is None for row in lists], pa.bool_()))
    else:
        array = pa.array(lists, LISTS[kind])
    assert strings(one_column(array), "c").to_pylist() == wanted
    assert strings(one_column(array[3:]), "c").to_pylist() == wanted[3:]
    title = ["In: " + text if text else None for text in wanted]
    assert texts(one_column(array), "In: {c}", {}).to_pylist() == title


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (pa.array([["a", None], None, [None, None], ["", "b"]], pa.list_(pa.string(), 2)), ["a", None, None, "b"]),
        (pa.FixedSizeListArray.from_arrays(["a", "b", "c", "d"], 2, mask=pa.array([True, False])), [None, "c, d"]),
        (pa.ListArray.from_arrays([0, 2, 3], ["a", "b", "c"], mask=pa.array([True, False])), [None, "c"]),
        (pa.array([[["a", None], None, ["b"]], [[None], []], None]), ["a, b", None, None]),
        (pa.array([[1, None, 3], [None], [True]][:2]), ["1, 3", None]),
        (pa.array([1.5, float("nan"), None]), ["1.5", None, None]),
        (pa.array([[2.5, float("nan")]]), ["2.5"]),
        (pa.array([[None], []], pa.list_(pa.null())), [None, None]),
        (pa.array([None, None]), [None, None]),
        (pa.array(["a", None, " "]).dictionary_encode(), ["a", None, None]),
        (pa.array([True, None]), ["true", None]),
    ],
)
def test_other_columns_as_texts(values: pa.Array, wanted: list[str | None]) -> None:
    assert strings(one_column(values), "c").to_pylist() == wanted


@pytest.mark.parametrize(
    "values",
    [
        pa.array([{"a": 1}]),
        pa.array([[{"a": 1}]]),
        pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
        pa.array([[[{"a": "b"}, None]]]),
    ],
)
def test_mappings_are_no_texts(values: pa.Array) -> None:
    with pytest.raises(InputError, match=r"column 'c' holds .*; a text needs strings, numbers or lists of them"):
        strings(one_column(values), "c")


# --- images ------------------------------------------------------------------------------------------------------


def pictures(raw: dict, seed: int) -> dict[int, bytes | None]:
    """Image bytes for two thirds of the items."""
    rng = np.random.default_rng(seed)
    return {int(i): rng.bytes(int(rng.integers(1, 4000))) if rng.random() < 0.66 else None for i in raw["items"]}


def stored_pictures(dataset: Dataset) -> dict[int, bytes | None]:
    ids = original(dataset)
    return {ids[row["item"]]: row["image"] for batch in dataset.content(["image"]) for row in batch.to_pylist()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("way", ["folder", "table"])
def test_images_reach_their_items(tmp_path: Path, raw: dict, way: str, seed: int) -> None:
    wanted = pictures(raw, seed)
    if way == "folder":
        for i, data in wanted.items():
            if data is not None:
                path = tmp_path / f"raw/pics/{i % 3}/{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        write(tmp_path / "raw/items.parquet", {"i": raw["items"], "shelf": raw["items"] % 3})
        dataset = tables(tmp_path, items={**ITEMS, "image": "pics/{shelf}/{i}.jpg"})
    else:
        order = np.random.default_rng(seed).permutation(list(wanted))
        for part, chunk in enumerate(np.array_split(order, 3)):
            columns = {"key": chunk, "jpeg": pa.array([wanted[int(i)] for i in chunk], pa.binary())}
            path = tmp_path / f"raw/pics-{part}.parquet"
            write(path, columns)
        images = {"files": "pics-*.parquet", "id": "key", "column": "jpeg"}
        dataset = tables(tmp_path, items=ITEMS, images=images)
    assert stored_pictures(dataset) == wanted
    assert dataset.manifest.content == {"text": 0, "image": sum(data is not None for data in wanted.values())}
    check(str(tmp_path / "out"))


def test_content_is_written_in_parts_and_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = interactions(seed=1, users=200, items=450, rows=5000)
    write(tmp_path / "raw/interactions.parquet", columns)
    items = np.unique(columns["i"])
    write(tmp_path / "raw/items.parquet", {"i": items, "words": [f"{i} " * 40 for i in items]})
    monkeypatch.setattr("distrec.data.parts.BYTES_PER_PART", 20_000)
    dataset = tables(tmp_path, items={**ITEMS, "text": "{words}"})
    parts = sorted((tmp_path / "out/content").iterdir())
    assert len(parts) == 3
    assert all(pq.ParquetFile(part).metadata.row_group(0).num_rows <= 200 for part in parts)
    assert [i for batch in dataset.content(["text"]) for i in batch["item"].to_pylist()] == list(range(len(items)))
    check(str(tmp_path / "out"))


def test_bad_images(tmp_path: Path, raw: dict) -> None:
    two = pa.array([b"x", b"y"], pa.binary())
    write(tmp_path / "raw/twice.parquet", {"key": raw["items"][[1, 1]], "jpeg": two})
    write(tmp_path / "raw/other.parquet", {"key": [1, 3], "jpeg": two})
    write(tmp_path / "raw/words.parquet", {"key": raw["items"][:2], "jpeg": ["x", "y"]})
    for name, message in {
        "twice": f"'twice.parquet' row 1: a second image for key {raw['items'][1]}",
        "other": "no key with an image is among the items",
        "words": "column 'jpeg' holds string; images must be a column of bytes",
        "none": "no file 'none.parquet'",
    }.items():
        refuse(tmp_path, message, items=ITEMS, images={"files": f"{name}.parquet", "id": "key", "column": "jpeg"})
    refuse(
        tmp_path, "has no column 'png'", items=ITEMS, images={"files": "twice.parquet", "id": "key", "column": "png"}
    )
    refuse(tmp_path, r"'pics/\{i\}.jpg' names no file", items={**ITEMS, "image": "pics/{i}.jpg"})
    images = {"files": "other.parquet", "id": "key", "column": "jpeg"}
    refuse(tmp_path, "both give images", items={**ITEMS, "image": "{i}"}, images=images)


def refused_images(tmp: Path, template: str) -> str:
    with pytest.raises(InputError) as caught:
        tables(tmp, out="refused", items={**ITEMS, "image": template})
    return str(caught.value)


def put(tmp: Path, *names: str, data: bytes = b"x") -> None:
    for name in names:
        path = tmp / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def test_linked_folders_and_files_are_followed(tmp_path: Path, raw: dict) -> None:
    first, second, third, fourth = raw["items"][:4]
    put(tmp_path, f"../elsewhere/deep/{first}.png", data=b"one")
    put(tmp_path, f"real/{second}.png", data=b"two")
    (tmp_path / "raw/pics").mkdir()
    (tmp_path / "raw/pics/a").symlink_to(tmp_path / "elsewhere/deep")
    (tmp_path / "raw/pics/b").symlink_to("../real")
    (tmp_path / "raw/pics/b/loop").symlink_to("..")
    (tmp_path / f"raw/real/{third}.png").symlink_to("nowhere")  # broken
    (tmp_path / f"raw/real/{fourth}.png").symlink_to(f"{second}.png")
    shelf = ["a" if i == first else "b/loop/real" if i == second else "b" for i in raw["items"]]
    write(tmp_path / "raw/items.parquet", {"i": raw["items"], "shelf": shelf})
    dataset = tables(tmp_path, items={**ITEMS, "image": "./pics//{shelf}/{i}.png"})
    found = stored_pictures(dataset)
    assert {i: data for i, data in found.items() if data} == {first: b"one", second: b"two", fourth: b"two"}
    (tmp_path / "linked").mkdir()
    (tmp_path / "raw/album").symlink_to(tmp_path / "raw/real")
    assert stored_pictures(tables(tmp_path, out="album", items={**ITEMS, "image": "album/{i}.png"}))[second] == b"two"


@pytest.mark.parametrize(
    ("file", "template"),
    [
        ("pics/{0}.PNG", "pics/{i}.png"),
        ("pics/{0}.jpg", "pics/{i}.jpeg"),
        ("pics/{0}.webp", "pics/{i}"),
        ("pics/000{0}.png", "pics/{i}.png"),
        ("Pics/Big/{0}.png", "pics/big/{i}.png"),
        ("pics/Å{0}.png", "pics/A\u030a{i}.png"),
        ("pics/{0}.png", "pics\\{i}.png"),
        ("pics/{0}.png", "pics/{i}.0.png"),
    ],
)
def test_a_template_that_nearly_names_files(tmp_path: Path, raw: dict, file: str, template: str) -> None:
    write(tmp_path / "raw/items.parquet", {"i": raw["items"]})
    first = raw["items"][0]
    put(tmp_path, file.format(first))
    message = refused_images(tmp_path, template)
    named = f"{template.format(i=first)!r} of item {first} (there is {file.format(first)!r})"
    assert f"'{template}' names no file in source" in message
    assert (
        f"(image: 26 of 26 items name a file that does not exist, first {named}, '"
        in f"(image: {message[message.index('(') + 1 :]}"
    )


def test_items_without_their_file_are_counted_and_named(
    tmp_path: Path, raw: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    items = raw["items"]
    names: list[str | None] = [f"{i}.png" for i in items]
    names[3], names[4] = None, "  "
    put(tmp_path, *(f"pics/{i}.png" for i in items[5:]), f"pics/{items[1]}.PNG", "pics/[a]*.png")
    names[5] = "[a]*.png"
    write(tmp_path / "raw/items.parquet", {"i": items, "name": names})
    dataset = tables(tmp_path, items={**ITEMS, "image": "pics/{name}"})
    a, b, c = items[:3]
    assert (
        f"  note      image: 3 of 26 items name a file that does not exist, first 'pics/{a}.png' of item {a}, "
        f"'pics/{b}.png' of item {b} (there is 'pics/{b}.PNG'), 'pics/{c}.png' of item {c}\n"
    ) in capsys.readouterr().out
    assert dataset.manifest.content["image"] == len(items) - 5
    assert stored_pictures(dataset)[items[5]] == b"x"


def test_no_name_leads_out_of_the_source(tmp_path: Path, raw: dict, capsys: pytest.CaptureFixture[str]) -> None:
    items = raw["items"]
    put(tmp_path, "../secret.png", data=b"secret")
    put(tmp_path, "pics/good.png", "other/good.png", f"pics/{'a' * 20}.png")
    hostile = [
        "a" * 3000,
        "../../secret",
        "/" + str(tmp_path / "secret"),
        "..",
        "../other/good",
        "x/../../../secret",
        "\0",
    ]
    names = [*hostile, *["good"] * (len(items) - len(hostile))]
    write(tmp_path / "raw/items.parquet", {"i": items, "name": names, "whole": [f"{tmp_path}/{n}" for n in names]})
    dataset = tables(tmp_path, items={**ITEMS, "image": "pics/{name}.png"})
    found = stored_pictures(dataset)
    assert [found[i] for i in items] == [None] * 7 + [b"x"] * (len(items) - 7)
    printed = capsys.readouterr().out
    assert "aaa…' of item" in printed
    assert "aaaaa" * 30 not in printed
    assert "image: 4 of 26 items name a file that does not exist, first 'pics/aaa" in printed
    assert (
        "image: 3 of 26 items name a file outside the source, which is not read, first 'pics/../../secret.png'"
        in printed
    )
    assert "'..' is not a name inside the source" in refused_images(tmp_path, "../secret.png{i}")
    for template in ("{whole}.png", "/{i}.png"):
        assert "name a file outside the source" in refused_images(tmp_path, template)
    write(tmp_path / "raw/items.parquet", {"i": items, "name": pa.nulls(len(items), pa.string())})
    assert "(every name is empty)" in refused_images(tmp_path, "pics/{name}.png")


def test_an_empty_file_is_an_image_that_encode_counts(tmp_path: Path, raw: dict) -> None:
    write(tmp_path / "raw/items.parquet", {"i": raw["items"]})
    put(tmp_path, f"{raw['items'][0]}.png", data=b"")
    dataset = tables(tmp_path, items={**ITEMS, "image": "./{i}.png"})
    assert stored_pictures(dataset)[raw["items"][0]] == b""
    check(str(tmp_path / "out"))


def test_other_files_beside_the_images_do_not_change_the_source(tmp_path: Path, raw: dict) -> None:
    write(tmp_path / "raw/items.parquet", {"i": raw["items"]})
    put(tmp_path, *(f"pics/{i}.png" for i in raw["items"]))
    source = tables(tmp_path, items={**ITEMS, "image": "pics/{i}.png"}).manifest.source
    put(tmp_path, "pics/readme.txt")
    assert tables(tmp_path, items={**ITEMS, "image": "pics/{i}.png"}).manifest.source == source
    put(tmp_path, f"pics/{raw['items'][0]}.png", data=b"longer")
    with pytest.raises(InputError, match="prepared from other source files"):
        tables(tmp_path, items={**ITEMS, "image": "pics/{i}.png"})


def test_images_are_stored_smaller(tmp_path: Path, raw: dict, capsys: pytest.CaptureFixture[str]) -> None:
    dice = np.random.default_rng(0)
    files = {int(i): b"damaged" if i == raw["items"][0] else picture(dice, 500 if i % 2 else 200) for i in raw["items"]}
    for i, data in files.items():
        put(tmp_path, f"{i}.png", data=data)
    write(tmp_path / "raw/items.parquet", {"i": raw["items"]})
    importer = {"interactions": {"files": "interactions.parquet", **SOURCE}, "items": {**ITEMS, "image": "{i}.png"}}
    whole = prepared(tmp_path, importer, out="whole")
    assert f"  content   image: {whole.items} of {whole.items} items, " in capsys.readouterr().out
    small = prepared(tmp_path, importer, image_side=224)
    again = prepared(tmp_path, importer, out="again", image_side=224)
    assert stored_pictures(whole) == {i: data for i, data in files.items() if i in original(whole)}
    found = stored_pictures(small)
    assert found == {i: shrunk(files[i], 224) for i in original(small)}
    assert {len(found[i] or b"") < len(files[i]) for i in found if i % 2} == {True}
    assert {found[i] == files[i] for i in found if i % 2 == 0 or i == raw["items"][0]} == {True}
    content = [entry for name, entry in small.manifest.files.items() if name.startswith("content/")]
    assert content == [entry for name, entry in again.manifest.files.items() if name.startswith("content/")]
    size, before = (sum(map(len, sorted(pictures.values()))) / 1e6 for pictures in (found, stored_pictures(whole)))  # type: ignore[arg-type]
    assert f"items, {size:.1f} MB (in the source {before:.1f} MB)\n" in capsys.readouterr().out
    check(str(tmp_path / "out"))
    with pytest.raises(
        InputError, match=r"'image_side' is 223 but must be at least 224: the shipped image encoder reads"
    ):
        prepared(tmp_path, importer, out="refused", image_side=223)


def picture(dice: np.random.Generator, side: int) -> bytes:
    sink = io.BytesIO()
    small = dice.integers(0, 256, (9, 9, 3), np.uint8)
    Image.fromarray(small).resize((side, side + 40), Image.Resampling.BICUBIC).save(sink, "BMP")
    return sink.getvalue()
