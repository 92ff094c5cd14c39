from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from distrec.data.check import check
from distrec.data.dataset import Dataset
from distrec.data.demo import write_demo
from distrec.data.prepare import prepare
from distrec.errors import InputError
from tests.data.damage import edit
from tests.data.raw import SOURCE, config, interactions, original_rows, prepared, write


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, np.ndarray]:
    """Random interactions, also written as `tmp_path/raw/interactions.parquet`."""
    columns = interactions(seed=1)
    write(tmp_path / "raw" / "interactions.parquet", columns)
    return columns


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv"])
def test_every_row_arrives_once_and_in_order(tmp_path: Path, seed: int, suffix: str) -> None:
    columns = interactions(seed)
    half = len(columns["u"]) // 2
    for part, cut in enumerate((slice(None, half), slice(half, None))):
        write(tmp_path / "raw" / f"log-{part}.{suffix}", {name: values[cut] for name, values in columns.items()})
    dataset = prepared(tmp_path, {"interactions": {"files": f"log-*.{suffix}", **SOURCE}})
    check(str(tmp_path / "out"))
    rows = original_rows(dataset)
    expected = set(zip(map(str, columns["u"]), map(str, columns["i"]), columns["t"].tolist()))
    assert {row[:3] for row in rows} == expected
    assert len(rows) == len(columns["u"]) == sum(dataset.manifest.interactions.values())
    place = {(int(u), int(i)): row for row, (u, i) in enumerate(zip(columns["u"], columns["i"]))}
    users = [int(v) for v in dataset.users_table()["original"].to_pylist()]
    items = [int(v) for v in dataset.items_table()["original"].to_pylist()]
    train = dataset.interactions("train")
    keys = [
        (u, t, place[users[u], items[i]])
        for u, i, t in zip(train.user.tolist(), train.item.tolist(), train.timestamp.tolist())
    ]
    assert keys == sorted(keys)


def test_context_is_written_beside_the_splits_and_checked(tmp_path: Path, raw: dict) -> None:
    dataset = prepared(tmp_path, split={"name": "by_user"})
    check(str(tmp_path / "out"))
    counts = dataset.manifest.interactions
    assert list(counts) == ["train", "valid", "test", "context"]
    assert {name: len(dataset.interactions(name)) for name in counts} == counts
    assert sum(counts.values()) == len(raw["u"])
    known, held_out = (dataset.interactions(name) for name in ("context", "valid"))
    assert set(held_out.user.tolist()) < set(known.user.tolist())
    assert not set(held_out.user.tolist()) & set(dataset.interactions("train").user.tolist())
    part = tmp_path / "out/interactions/context/part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=r"'interactions/context/part-00000\.parquet' cannot be read as Parquet"):
        check(str(tmp_path / "out"))


def test_without_a_rule_that_makes_one_there_is_no_context(tmp_path: Path, raw: dict) -> None:
    dataset = prepared(tmp_path)
    assert len(dataset.interactions("context")) == 0
    assert list(dataset.manifest.interactions) == ["train", "valid", "test"]


def test_the_split_does_not_depend_on_the_numbering_nor_without_equal_times_on_the_order(tmp_path: Path) -> None:
    raw = interactions(seed=1)
    raw["t"] = np.random.default_rng(2).permutation(len(raw["u"]))
    write(tmp_path / "raw" / "interactions.parquet", raw)
    expected = original_rows(prepared(tmp_path))
    for rule in ("first_seen", "shuffled"):
        assert original_rows(prepared(tmp_path, id_order=rule, out=rule)) == expected
    shuffle = np.random.default_rng(0).permutation(len(raw["u"]))
    write(tmp_path / "raw" / "shuffled.csv", {name: values[shuffle] for name, values in raw.items()})
    other = prepared(tmp_path, {"interactions": {"files": "shuffled.csv", **SOURCE}}, out="other")
    assert original_rows(other) == expected


def test_id_orders(tmp_path: Path, raw: dict) -> None:
    def ids(rule: str, **keys: object) -> tuple[list[int], list[int]]:
        dataset = prepared(tmp_path, id_order=rule, out=f"{rule}{keys}", **keys)
        tables = (dataset.users_table(), dataset.items_table())
        assert all(table["index"].to_pylist() == list(range(table.num_rows)) for table in tables)
        return tuple([int(value) for value in table["original"].to_pylist()] for table in tables)  # type: ignore[return-value]

    users, items = ids("sorted")
    assert users == sorted(set(raw["u"].tolist()))
    assert items == sorted(set(raw["i"].tolist()))
    assert ids("first_seen") == (list(dict.fromkeys(raw["u"].tolist())), list(dict.fromkeys(raw["i"].tolist())))
    shuffled = ids("shuffled", seed=1)
    assert sorted(shuffled[0]) == users
    assert sorted(shuffled[1]) == items
    assert shuffled[0] != users
    assert shuffled != ids("shuffled", seed=2)
    with pytest.raises(InputError, match="user id 0 is absent among the 40 kept"):
        ids("given")


def test_given_ids_are_indices(tmp_path: Path) -> None:
    columns = interactions(2)
    write(tmp_path / "raw/interactions.parquet", {**columns, "u": columns["u"] // 3 - 1, "i": columns["i"] // 7})
    dataset = prepared(tmp_path, id_order="given")
    assert dataset.users_table()["original"].to_pylist() == [str(u) for u in range(40)]
    big = columns["i"].astype(np.int64) // 7
    big[0] = 2**31
    write(tmp_path / "raw/interactions.parquet", {**columns, "u": columns["u"] // 3 - 1, "i": big})
    with pytest.raises(InputError, match="item id 2147483648 overflows a 32-bit index"):
        prepared(tmp_path, id_order="given", out="big")


def test_filters_apply_in_order(tmp_path: Path) -> None:
    columns = interactions(3)
    again = {name: np.concatenate([values, values[:50]]) for name, values in columns.items()}
    again["t"][-50:] += 100  # the same pairs later
    write(tmp_path / "raw/interactions.parquet", again)
    dataset = prepared(tmp_path, min_rating=2.0, duplicates="last", k_core={"users": 5, "items": 4})
    positive = again["r"] >= 2.0
    left = {(u, i): t for u, i, t in zip(*(again[name][positive].tolist() for name in "uit"))}  # the last one wins
    while True:
        users, items = ([pair[side] for pair in left] for side in (0, 1))
        stay = {p: t for p, t in left.items() if users.count(p[0]) >= 5 and items.count(p[1]) >= 4}
        if len(stay) == len(left):
            break
        left = stay
    assert {row[:3] for row in original_rows(dataset)} == {(str(u), str(i), t) for (u, i), t in left.items()}
    with pytest.raises(InputError, match=r"once \(again in 'interactions.parquet' row \d+\) and 'duplicates' is"):
        prepared(tmp_path, duplicates="refuse", out="refuse")
    with pytest.raises(InputError, match=r"nothing is left of .* after dropping .* outside the k-core"):
        prepared(tmp_path, k_core={"users": 1000}, out="none")
    with pytest.raises(InputError, match=r"nothing is left of .* rated below 9"):
        prepared(tmp_path, min_rating=9, out="none")


def test_times_are_optional_where_the_split_needs_none(tmp_path: Path, raw: dict) -> None:
    untimed = {"interactions": {"files": "interactions.parquet", "user": "u", "item": "i"}}
    dataset = prepared(tmp_path, untimed, split={"name": "per_user_random"})
    assert not dataset.interactions("train").timestamp.any()
    for rule in ("per_user_time", "leave_last_out", "global_time"):
        with pytest.raises(InputError, match=f"'{rule}' but the source has no timestamp column"):
            prepared(tmp_path, untimed, split={"name": rule}, out=rule)
    write(tmp_path / "raw/few.csv", {"u": [1, 1, 2, 2], "i": [1, 2, 1, 2]})
    few = {"interactions": {"files": "few.csv", "user": "u", "item": "i"}}
    with pytest.raises(InputError, match=r"rule 'per_user_random' is empty .* relax the filters, add interactions or"):
        prepared(tmp_path, few, split={"name": "per_user_random"}, out="few")
    with pytest.raises(InputError, match="'given' but the source has no split column"):
        prepared(tmp_path, untimed, split={"name": "given"}, out="given")
    with pytest.raises(InputError, match="'min_rating' is set but the source has no rating column"):
        prepared(tmp_path, untimed, split={"name": "per_user_random"}, min_rating=3, out="rating")


@pytest.mark.parametrize("labels", [["train", "valid", "test"], [0, 1, 2]])
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_given_split(tmp_path: Path, labels: list, suffix: str) -> None:
    columns = interactions(4)
    label = np.random.default_rng(4).integers(0, 3, len(columns["u"]))
    for user in np.unique(columns["u"]):
        label[np.flatnonzero(columns["u"] == user)[0]] = 0
    file = tmp_path / "raw" / f"log.{suffix}"
    importer = {"interactions": {"files": file.name, **SOURCE, "split": "part"}}
    write(file, {**columns, "part": [labels[value] for value in label]})
    names = np.array(["train", "valid", "test"])[label].tolist()
    expected = set(zip(map(str, columns["u"]), map(str, columns["i"]), columns["t"].tolist(), names))
    assert original_rows(prepared(tmp_path, importer, split={"name": "given"})) == expected

    alone = columns["u"] == 5
    write(file, {**columns, "part": [labels[2 if mine else value] for mine, value in zip(alone, label)]})
    with pytest.raises(InputError, match=r"user 5 has no train interaction in the given split \(1 such users\)"):
        prepared(tmp_path, importer, split={"name": "given"}, out="alone")
    write(file, {**columns, "part": [labels[0 if value == 1 else value] for value in label]})
    with pytest.raises(InputError, match=r"split 'valid' of rule 'given' is empty .* correct the labels or choose"):
        prepared(tmp_path, importer, split={"name": "given"}, out="empty")


def test_unknown_keys_rules_and_importers(tmp_path: Path, raw: dict) -> None:
    with pytest.raises(InputError, match="unknown key 'min_ratings'; did you mean 'min_rating'"):
        prepared(tmp_path, min_ratings=3)
    with pytest.raises(InputError, match=r"key 'importer.name' is 'table'; did you mean 'tables'"):
        prepared(tmp_path, {"name": "table"})
    with pytest.raises(InputError, match=r"unknown key 'importer.interactions.usr'; did you mean 'user'"):
        prepared(tmp_path, {"interactions": {"files": "interactions.parquet", "usr": "u"}})
    with pytest.raises(InputError, match=r"key 'split.name' is 'per_item' but must be 'given'"):
        prepared(tmp_path, split={"name": "per_item"})
    with pytest.raises(InputError, match=r"key 'importer.interactions.files' is 3"):
        prepared(tmp_path, {"interactions": {"files": 3}})
    with pytest.raises(InputError, match=r"source '.*nowhere' does not exist"):
        prepare(str(config(tmp_path / "c.yaml")), str(tmp_path / "nowhere"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_overrides(tmp_path: Path, raw: dict) -> None:
    path = str(config(tmp_path / "c.yaml"))
    dataset = prepare(path, str(tmp_path / "raw"), str(tmp_path / "out"), ["id_order=shuffled", "k_core.users=5"])
    assert dataset.manifest.config["k_core"] == {"users": 5, "items": 0}
    assert dataset.manifest.id_order == "shuffled"


def test_the_same_again_is_left_alone_and_anything_else_refused(tmp_path: Path, raw: dict, capsys) -> None:
    first = prepared(tmp_path)
    stamp = (tmp_path / "out/users.parquet").stat().st_mtime_ns
    assert prepared(tmp_path).hash == first.hash
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "out/users.parquet").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="prepared with another 'min_rating'"):
        prepared(tmp_path, min_rating=1)
    write(tmp_path / "raw/interactions.parquet", {**raw, "t": raw["t"] + 1})
    with pytest.raises(InputError, match="prepared from other source files"):
        prepared(tmp_path)
    assert Dataset.open(str(tmp_path / "out")).hash == first.hash
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/users.parquet").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        prepared(tmp_path, out="notes")
    assert (tmp_path / "notes/users.parquet").read_text() == "mine"


def test_a_damaged_dataset_is_made_again(tmp_path: Path, raw: dict, capsys) -> None:
    first = prepared(tmp_path)
    path = tmp_path / "out/interactions/train/part-00000.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:9] + bytes([whole[9] ^ 1]) + whole[10:])
    with pytest.raises(InputError, match=r"checksum of 'interactions/train/part-00000.parquet' differs"):
        check(str(tmp_path / "out"))
    assert prepared(tmp_path).hash == first.hash
    assert "damaged" in capsys.readouterr().out
    assert path.read_bytes() == whole
    check(str(tmp_path / "out"))
    path.write_bytes(whole[:99])
    assert prepared(tmp_path).hash == first.hash
    assert "has 99 bytes" in capsys.readouterr().out
    edit(tmp_path / "out", "interactions/train/part-00000.parquet", lambda t: t.drop(["timestamp"]))
    prepared(tmp_path)
    assert path.read_bytes() == whole


def _killed(tmp: Path, file: str) -> None:
    """Prepare, and die by SIGKILL when `file` is about to be written."""
    import distrec.data.storage as storage

    write_bytes = storage.Folder.write_bytes

    def dying(self, data, *parts):
        if "/".join(parts) == file:
            (Path(self.at(*parts)).parent).mkdir(parents=True, exist_ok=True)
            Path(self.at(*parts) + ".12345678.part").write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write_bytes(self, data, *parts)

    storage.Folder.write_bytes = dying  # type: ignore[method-assign]
    prepared(tmp)


@pytest.mark.parametrize("file", ["users.parquet", "interactions/valid/part-00000.parquet", "manifest.json"])
def test_a_killed_prepare_is_no_dataset_and_the_same_command_finishes_it(tmp_path: Path, raw: dict, file: str) -> None:
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(tmp_path, file))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    for read in (Dataset.open, check):
        with pytest.raises(InputError, match="an interrupted prepare is there"):
            read(str(tmp_path / "out"))
    again = prepared(tmp_path)
    assert again.hash == prepared(tmp_path, out="undisturbed").hash
    left, right = (
        sorted(path.relative_to(tmp_path / out) for path in (tmp_path / out).rglob("*"))
        for out in ("out", "undisturbed")
    )
    assert left == right


def test_a_prepare_killed_while_it_repairs_a_damaged_dataset(tmp_path: Path, raw: dict) -> None:
    first = prepared(tmp_path)
    (tmp_path / "out/items.parquet").write_bytes(b"damage")
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(tmp_path, "items.parquet"))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(InputError, match="an interrupted prepare is there"):
        Dataset.open(str(tmp_path / "out"))
    assert prepared(tmp_path).hash == first.hash


def test_a_folder_that_cannot_be_written(tmp_path: Path, raw: dict) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    shutil.rmtree(tmp_path / "raw")  # the answer comes before the source is read
    for out, file in (("file", "file"), ("file/deep/out", "file"), ("nowhere", "nowhere"), ("nowhere/out", "nowhere")):
        with pytest.raises(InputError, match=rf"out '.*/{out}' is not a folder, since '.*/{file}' is a file; give an"):
            prepared(tmp_path, out=out)
        with pytest.raises(InputError, match=rf"option '--out' is '.*/{out}', which is not a folder, since"):
            write_demo(str(tmp_path / out))
    assert (tmp_path / "file").read_text() == "not a folder"


def test_straight_to_and_from_an_object_store(tmp_path: Path, raw: dict, s3: str, capsys) -> None:
    import fsspec

    rng = np.random.default_rng(0)
    ids = np.unique(raw["i"])
    write(tmp_path / "raw/items.csv", {"i": ids, "name": [f"thing {i}" for i in ids]})
    np.save(tmp_path / "raw/text.npy", rng.normal(size=(len(ids), 6)).astype(np.float16))
    (tmp_path / "raw/pics").mkdir()
    for i in ids[::2]:
        (tmp_path / f"raw/pics/{i}.jpg").write_bytes(rng.bytes(300))
    importer = {
        "interactions": {"files": "interactions.parquet", **SOURCE},
        "items": {"files": "items.csv", "id": "i", "title": "name", "text": "{name}", "image": "pics/{i}.jpg"},
        "features": {"text": {"files": "text.npy"}},
    }
    local = prepared(tmp_path, importer)
    fsspec.filesystem("s3").put(str(tmp_path / "raw"), f"{s3}/raw", recursive=True)
    path = str(config(tmp_path / "data.yaml", importer))
    remote = prepare(path, f"{s3}/raw", f"{s3}/deep/out")
    assert remote.manifest == local.manifest
    assert remote.hash == local.hash
    check(f"{s3}/deep/out")
    for split in ("train", "valid", "test"):
        one, two = local.interactions(split), remote.interactions(split)
        assert np.array_equal(one.item, two.item)
        assert np.array_equal(one.user, two.user)
    assert np.array_equal(local.feature_rows("text", 3, 9)[0], remote.feature_rows("text", 3, 9)[0])
    assert [b.to_pylist() for b in local.content(["image"])] == [b.to_pylist() for b in remote.content(["image"])]
    prepare(path, f"{s3}/raw", f"{s3}/deep/out")
    assert "nothing to do" in capsys.readouterr().out
    fsspec.filesystem("s3").rm(f"{s3}/deep/out/manifest.json")
    with pytest.raises(InputError, match="holds other files"):  # no mark says that a prepare made this folder
        prepare(path, f"{s3}/raw", f"{s3}/deep/out")
    with pytest.raises(InputError, match=r"source 's3://.*' does not exist"):
        prepare(path, f"{s3}/none", f"{s3}/other")
