import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from distrec.data.storage import open_folder, open_parquet, parquet_bytes, sha256


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.multiprocess)])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A path that does not exist yet, on each kind of storage."""
    return str(tmp_path / "data") if request.param == "local" else f"{request.getfixturevalue('s3')}/data"


def test_what_is_written_is_read(where: str):
    folder = open_folder(where)
    assert not folder.exists()
    assert folder.names() == []
    folder.make()
    folder.write_bytes(b"\x00one", "a", "b", "one.bin")
    folder.write_bytes(b"two", "a", "two.bin")
    folder.write_json({"ä": [1, None, 2.5]}, "top.json")
    assert folder.names() == ["a", "top.json"]
    assert folder.names("a") == ["b", "two.bin"]
    assert folder.names("none") == []
    assert folder.exists("a")
    assert folder.exists("a", "b", "one.bin")
    assert not folder.exists("a", "one.bin")
    assert folder.read_bytes("a", "b", "one.bin") == b"\x00one"
    assert folder.folder("a").folder("b").read_bytes("one.bin") == b"\x00one"
    assert folder.read_json("top.json") == {"ä": [1, None, 2.5]}
    assert open_folder(where).read_bytes("a", "two.bin") == b"two"
    assert str(folder) == where


def test_a_second_write_replaces_the_first(where: str):
    folder = open_folder(where)
    for content in (b"long content", b"", b"short"):
        folder.write_bytes(content, "file")
        assert folder.read_bytes("file") == content
        assert folder.names() == ["file"], "no draft is left behind"


def test_another_reader_sees_a_new_file_at_once(where: str):
    reader, writer = open_folder(where), open_folder(where)
    assert not reader.exists("late")
    assert reader.names() == []
    writer.write_bytes(b"x", "late")
    assert reader.exists("late")
    assert reader.names() == ["late"]
    writer.remove("late")
    assert not reader.exists("late")


def test_remove_takes_files_and_folders_and_forgives_absence(where: str):
    folder = open_folder(where)
    for name in ("a/one", "a/b/two", "c"):
        folder.write_bytes(b"x", *name.split("/"))
    folder.remove("none")
    folder.remove("a")
    folder.remove("a")
    assert folder.names() == ["c"]


def test_a_missing_file_is_a_file_not_found(where: str):
    with pytest.raises(FileNotFoundError):
        open_folder(where).read_bytes("none")


def test_parquet_is_read_by_row_group(where: str):
    folder = open_folder(where)
    table = pa.table({"n": np.arange(100, dtype=np.int32), "s": [str(n) for n in range(100)]})
    data = parquet_bytes(table, row_group_rows=30)
    assert data == parquet_bytes(table, row_group_rows=30), "equal tables give equal bytes, so checksums mean something"
    folder.write_bytes(data, "part.parquet")
    file = open_parquet(folder, "part.parquet")
    assert file.num_row_groups == 4
    assert file.read_row_group(3).equals(table.slice(90))
    assert file.read().equals(table)


def test_a_local_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = open_folder(str(tmp_path))
    folder.write_bytes(b"old", "file")

    def full(number: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        folder.write_bytes(b"new content", "file")
    assert folder.read_bytes("file") == b"old"


def test_sha256_is_the_known_one():
    assert sha256(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_copies_are_whole_and_of_their_own(where: str):
    folder = open_folder(where)
    for name in ("from/deep/epoch-1/state", "from/deep/epoch-2/state", "from/file"):
        folder.write_bytes(name.encode(), *name.split("/"))
    source, target = folder.folder("from"), folder.folder("to")
    target.make()
    for name in ("deep", "file", "absent"):
        source.copy(target, name)
    assert target.names() == ["deep", "file"]
    assert target.names("deep") == ["epoch-1", "epoch-2"]
    source.remove()
    assert target.read_bytes("deep", "epoch-2", "state") == b"from/deep/epoch-2/state"
    assert target.read_bytes("file") == b"from/file"
