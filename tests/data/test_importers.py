from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from distrec.data.check import check
from distrec.errors import InputError
from tests.data.imported import ITEMS, original, refuse, tables
from tests.data.raw import SOURCE, interactions, prepared, write

# --- ids and numbers ---------------------------------------------------------------------------------------------


def rewrite(tmp: Path, suffix: str, **columns: Any) -> dict[str, Any]:
    """Write interactions with some columns replaced to a file of another kind; return its `interactions` section."""
    write(tmp / f"raw/log{suffix}", {**interactions(seed=1), **columns})
    return {"interactions": {"files": f"log{suffix}", **SOURCE}}


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("i", 2.5, r"i is 2.5, a fractional id"),
        ("u", None, r"u is empty"),
        ("r", float("nan"), r"r is nan; give a finite number"),
        ("r", float("-inf"), r"r is -inf; give a finite number"),
        ("r", None, r"r is empty"),
        ("t", 3.25, r"t is 3.25; give whole seconds"),
    ],
)
def test_bad_values_are_named_by_row(
    tmp_path: Path, suffix: str, column: str, value: float | None, message: str
) -> None:
    values = interactions(seed=1)[column].tolist()
    if isinstance(value, float):
        values = [float(v) for v in values]
    values[4] = value
    line = "" if suffix == ".parquet" else r" \(line 6\)"
    refuse(tmp_path, f"'log{suffix}' row 4{line}: {message}", **rewrite(tmp_path, suffix, **{column: values}))


def test_words_where_numbers_belong(tmp_path: Path) -> None:
    ratings = [str(value) for value in interactions(seed=1)["r"]]
    ratings[7] = "good"
    refuse(tmp_path, "'log.csv' row 7 \\(line 9\\): r is 'good', not a number", **rewrite(tmp_path, ".csv", r=ratings))
    times = ["yesterday" for _ in ratings]
    refuse(tmp_path, "'log.csv' row 0 \\(line 2\\): t is 'yesterday', not a time", **rewrite(tmp_path, ".csv", t=times))
    labels = ["train" for _ in ratings]
    labels[3] = "dev"
    section = rewrite(tmp_path, ".csv", s=labels)["interactions"]
    refuse(
        tmp_path,
        r"'log.csv' row 3 \(line 5\): s is dev; a split is train, valid or test",
        interactions={**section, "split": "s"},
    )
    refuse(tmp_path, "'log.parquet': column 'u' holds bool", **rewrite(tmp_path, ".parquet", u=[True] * len(ratings)))


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_ids_keep_their_form(tmp_path: Path, suffix: str) -> None:
    columns = interactions(seed=1)
    users = [f"{u:05d}" for u in columns["u"]]  # a leading zero would be lost in a number
    items = [f"B{i}é" for i in columns["i"]]
    dataset = tables(tmp_path, order="sorted", **rewrite(tmp_path, suffix, u=users, i=items))
    assert dataset.users_table()["original"].to_pylist() == sorted(set(users))
    assert dataset.items_table()["original"].to_pylist() == sorted(set(items), key=lambda text: text.encode())


def test_times_may_be_dates(tmp_path: Path) -> None:
    columns = interactions(seed=1)
    plain = tables(tmp_path, **rewrite(tmp_path, ".parquet"))
    stamps = pa.array(columns["t"]).cast(pa.timestamp("s"))
    dated = tables(tmp_path, out="dated", **rewrite(tmp_path, ".csv", t=[str(stamp) for stamp in stamps]))
    for split in ("train", "valid", "test"):
        assert np.array_equal(plain.interactions(split).timestamp, dated.interactions(split).timestamp)


def test_files_that_are_missing_corrupt_or_of_another_kind(tmp_path: Path, raw: dict) -> None:
    folder = tmp_path / "raw"
    (folder / "broken.parquet").write_bytes((folder / "interactions.parquet").read_bytes()[:-300])
    (folder / "ragged.csv").write_text("u,i,r,t\n1,2,3,4\n1,2,3\n")
    (folder / "binary.csv").write_bytes(b"u,i,r,t\n\xff\xfe,2,3,4\n")
    (folder / "none.csv").write_text("u,i,r,t\n")
    (folder / "empty.csv").write_text("")
    (folder / "log.xlsx").write_text("u,i,r,t\n1,2,3,4\n")
    for name, message in {
        "interaction.parquet": r"no file 'interaction.parquet' in source .* did you mean 'interactions.parquet'",
        "part-*.csv": r"no file 'part-\*.csv'",
        "broken.parquet": r"'broken.parquet' is not readable as parquet",
        "ragged.csv": r"'ragged.csv' row 1 \(line 3\): 3 values for 4 columns; .*bad_rows: drop",
        "binary.csv": r"'binary.csv' line 2: byte 0xFF is not UTF-8; set 'importer.interactions.encoding: latin-1'",
        "none.csv": r"'none.csv' has no interactions",
        "empty.csv": r"'empty.csv' is empty",
        "log.xlsx": r"'log.xlsx' is not a table of a known kind",
    }.items():
        refuse(tmp_path, message, interactions={"files": name, **SOURCE})
    section = {"files": "interactions.parquet", **SOURCE, "user": "user"}
    refuse(tmp_path, r"'interactions.parquet' has no column 'user'; valid here: i, r, t, u", interactions=section)


# --- items -------------------------------------------------------------------------------------------------------


def test_items_table_gives_titles_and_cold_items(tmp_path: Path, raw: dict) -> None:
    titles = [None if i == 1000 else f"item {i}" for i in raw["items"]]
    write(tmp_path / "raw/items.parquet", {"i": raw["items"], "name": titles})
    for order in ("sorted", "first_seen", "shuffled"):
        dataset = tables(tmp_path, out=order, order=order, items={**ITEMS, "title": "name"})
        expected = {int(i): title for i, title in zip(raw["items"], titles)}
        assert dict(zip(original(dataset), dataset.items_table()["title"].to_pylist())) == expected
    assert original(tables(tmp_path, out="seen", order="first_seen", items=ITEMS))[-1] == 1000
    assert 1000 not in original(tables(tmp_path, out="interacted", keep="interacted", items=ITEMS))


def test_items_that_are_unknown_or_twice(tmp_path: Path, raw: dict) -> None:
    write(tmp_path / "raw/items.parquet", {"i": raw["items"][raw["items"] != raw["i"][6]]})
    first = int(np.flatnonzero(raw["i"] == raw["i"][6])[0])
    message = f"'interactions.parquet' row {first}: i {raw['i'][6]} is not among the {len(raw['items']) - 1} items"
    refuse(tmp_path, message, items=ITEMS)
    write(tmp_path / "raw/items.parquet", {"i": np.append(raw["items"], raw["items"][2])})
    message = f"'items.parquet' row {len(raw['items'])}: i {raw['items'][2]} appears a second time .*row 2"
    refuse(tmp_path, message, items=ITEMS)


def test_numbers_in_one_table_and_strings_in_the_other(tmp_path: Path, raw: dict) -> None:
    write(tmp_path / "raw/items.parquet", {"i": [str(i) for i in raw["items"]]})
    assert sorted(original(tables(tmp_path, items=ITEMS))) == sorted(raw["items"].tolist())


# --- mmrec -------------------------------------------------------------------------------------------------------


def toolbox(tmp: Path, seed: int = 3, **columns: Any) -> dict[str, np.ndarray]:
    """A folder in MMRec's layout: dense ids, labels, and features, with one item that has no interaction."""
    raw = interactions(seed)
    user, item = raw["u"] // 3 - 1, raw["i"] // 7
    label = np.random.default_rng(seed).integers(0, 3, len(user))
    for u in np.unique(user):
        label[np.flatnonzero(user == u)[0]] = 0
    table = {"userID": user, "itemID": item, "rating": raw["r"], "timestamp": raw["t"], "x_label": label, **columns}
    write(tmp / "raw/shop.tsv", table)
    (tmp / "raw/shop.tsv").rename(tmp / "raw/shop.inter")
    return table


GIVEN: dict[str, Any] = {"split": {"name": "given"}, "id_order": "given", "keep_items": "all"}


def test_mmrec(tmp_path: Path) -> None:
    table = toolbox(tmp_path)
    importer = {"name": "mmrec", "dataset": "shop"}
    plain = prepared(tmp_path, importer, out="plain", **GIVEN)
    assert (plain.items, plain.manifest.features) == (25, {})
    values = np.random.default_rng(0).normal(size=(26, 8))
    np.save(tmp_path / "raw/image_feat.npy", values)
    np.save(tmp_path / "raw/text_feat.npy", values.astype(np.float16)[:, :3])
    dataset = prepared(tmp_path, importer, **GIVEN)
    assert (dataset.users, dataset.items) == (40, 26)
    for label, split in enumerate(("train", "valid", "test")):
        found = dataset.interactions(split)
        here = table["x_label"] == label
        expected = zip(table["userID"][here], table["itemID"][here], table["timestamp"][here])
        assert sorted(zip(found.user, found.item, found.timestamp)) == sorted(expected)
    assert np.array_equal(dataset.feature_rows("image", 0, 26)[0], values.astype(np.float32))
    assert dataset.manifest.features["text"].dtype == "float16"
    check(str(tmp_path / "out"))

    np.save(tmp_path / "raw/text_feat.npy", values[:-1])
    with pytest.raises(InputError, match=r"'text_feat.npy' has 25 feature rows for 26 items"):
        prepared(tmp_path, importer, out="refused", **GIVEN)
    (tmp_path / "raw/text_feat.npy").unlink()
    toolbox(tmp_path, itemID=np.where(np.arange(len(table["itemID"])) == 9, 26, table["itemID"]))
    with pytest.raises(
        InputError, match=r"'shop.inter' row 9 \(line 11\): itemID 26 is not among the 26 rows of 'image_feat.npy'"
    ):
        prepared(tmp_path, importer, out="refused", **GIVEN)
    toolbox(tmp_path, x_label=np.where(np.arange(len(table["itemID"])) == 9, 3, table["x_label"]))
    with pytest.raises(InputError, match=r"'shop.inter' row 9 \(line 11\): x_label is 3; a split is"):
        prepared(tmp_path, importer, out="refused", **GIVEN)
    (tmp_path / "raw/image_feat.npy").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"'image_feat.npy' is not readable as NumPy array"):
        prepared(tmp_path, importer, out="refused", **GIVEN)
    with pytest.raises(InputError, match=r"no file 'shopp.inter' .* did you mean 'shop.inter'"):
        prepared(tmp_path, {"name": "mmrec", "dataset": "shopp"}, out="refused", **GIVEN)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".item"])
def test_typed_headings_in_configs(tmp_path: Path, raw: dict, suffix: str) -> None:
    names = ["item_id:token", "title:token_seq", "Book: Title!"]
    table = dict(zip(names, [raw["items"], [f"t{i}" for i in raw["items"]], [f"b{i}" for i in raw["items"]]]))
    for given, plain in ((table, False), ({n.partition(":token")[0]: c for n, c in table.items()}, True)):
        write(tmp_path / f"raw/items{suffix}", given)
        items = {"files": f"items{suffix}", "id": "item_id:token", "title": "title:token_seq"}
        items["text"] = "{title:token_seq} {Book: Title!}"
        dataset = tables(tmp_path, out=f"out-{plain}", items=items)
        found = {row["item"]: row["text"] for batch in dataset.content(["text"]) for row in batch.to_pylist()}
        ids = original(dataset)
        assert found == {index: f"t{i} b{i}" for index, i in enumerate(ids)}
        assert dataset.items_table()["title"].to_pylist() == [f"t{i}" for i in ids]
    write(tmp_path / f"raw/items{suffix}", table)
    if suffix != ".item":
        message = "has no column 'item_id'; did you mean 'item_id:token'"
        refuse(tmp_path, message, items={"files": f"items{suffix}", "id": "item_id"})
