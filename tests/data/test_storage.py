import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from botocore.exceptions import EndpointConnectionError, NoCredentialsError

from distrec.data.parquet import open_parquet, parquet_bytes
from distrec.data.refusals import Unanswered
from distrec.data.storage import Folder, open_folder, sha256
from distrec.errors import InputError, StorageError


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
    assert folder.sha256("a", "b", "one.bin") == sha256(b"\x00one")
    folder.write_bytes(large := bytes(range(256)) * (5 << 12), "large")  # more than one block
    assert folder.sha256("large") == sha256(large)
    folder.remove("large")
    with pytest.raises(FileNotFoundError):
        folder.sha256("a", "none")
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


def test_the_age_of_a_file_is_told_by_the_storage(where: str, monkeypatch: pytest.MonkeyPatch):
    folder = open_folder(where)
    assert folder.age("none") == 0
    before = time.monotonic()
    folder.write_bytes(b"x", "file")
    written = time.monotonic()
    assert folder.age("file") <= time.monotonic() - before
    time.sleep(3)
    monkeypatch.setattr("time.time", lambda: 0.0)  # of this host: it does not matter
    least = time.monotonic() - written
    age = folder.age("file")
    # An object store tells whole seconds, so up to two are missing.
    assert least - 2.1 < age <= time.monotonic() - before
    assert folder.names() == ["file"]


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
    assert folder.names() == ["file"], "no draft is left behind"


ON_A_FULL_DISK = """
import os, sys, torch
from distrec.data.storage import open_folder
from distrec.errors import StorageFull, exit_status
from distrec.training.tensor_file import write_tensors

folder = open_folder(sys.argv[1]).folder("run")
folder.write_bytes(b"old", "file")
big = bytes(2 << 20)
writes = {
    "write_bytes": lambda: folder.write_bytes(big, "file"),
    "create": lambda: folder.create(big, "new"),
    "tensors": lambda: write_tensors(folder, "weights", {"w": torch.zeros(1 << 19)}, {}),
    "copy": lambda: open_folder(sys.argv[2]).copy(folder, "big"),
}
for name, write in writes.items():
    try:
        write()
    except StorageFull as error:
        assert exit_status(error) == 2
        print(name, error)
    assert folder.names() == ["file"], folder.names()
assert folder.read_bytes("file") == b"old"
"""


def test_a_full_disk_is_one_sentence_and_leaves_no_draft(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "big").write_bytes(bytes(2 << 20))
    shell = 'mount -t tmpfs -o size=1m none "$1" || exit 77; exec "$2" -c "$3" "$1" "$4"'
    words = ["unshare", "-m", "sh", "-c", shell, "sh", str(tmp_path / "disk"), sys.executable, ON_A_FULL_DISK]
    if not shutil.which("unshare"):
        pytest.skip("there is no 'unshare' to mount a small disk with")
    ran = subprocess.run([*words, str(tmp_path)], capture_output=True, text=True, timeout=120)
    if ran.returncode == 77 or "unshare failed" in ran.stderr:
        pytest.skip("only root may mount a small disk")
    assert ran.returncode == 0, ran.stderr
    told = dict(line.split(" ", 1) for line in ran.stdout.splitlines())
    path = re.escape(str(tmp_path / "disk" / "run"))
    for name, file, needed in (
        ("write_bytes", "file", "; 2,097,152 bytes are needed, "),
        ("create", "new", "; 2,097,152 bytes are needed, "),
        ("tensors", "weights", "; 2,097,152 bytes are needed, "),
        ("copy", "big", "; "),
    ):
        sentence = (
            rf"'{path}/{file}' cannot be written, because the disk is full{needed}[0-9,]+ (bytes )?are free; make ro"
        )
        assert re.match(sentence, told.pop(name))
    assert not told


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


class Failing:
    """A file system whose every call raises one error."""

    def __init__(self, error: Exception):
        self.error = error

    def invalidate_cache(self) -> None:
        """As in fsspec."""

    def _raise(self, *arguments: Any, **options: Any) -> Any:
        raise self.error

    info = ls = open = cat_file = pipe_file = _raise


@pytest.mark.parametrize(
    ("error", "what", "reason"),
    [
        (PermissionError("Access Denied"), "read", r"Access Denied\); check the address and the rights"),
        (OSError(5, "Input/output error"), "read", r"Input/output error"),
        (EndpointConnectionError(endpoint_url="http://x"), "reached", r'Could not .*http://x.*"\); check the endpoint'),
        (NoCredentialsError(), "reached", r"Unable to locate credentials\); give an access key"),
        (TimeoutError(), "read", r"TimeoutError"),
        (RuntimeError("Connection dropped"), "reached", r"Connection dropped"),
        (Unanswered("503 SlowDown, for 120 s"), "reached", r"503 SlowDown, for 120 s\); see whether the store is up"),
    ],
)
def test_what_an_object_store_raises_is_one_sentence(error: Exception, what: str, reason: str):
    folder = Folder(Failing(error), "bucket/data", local=False)
    for call in (folder.exists, folder.names, folder.is_file, lambda: folder.open("x"), lambda: folder.sha256("x")):
        with pytest.raises(StorageError, match=rf"^'s3://bucket/data.*cannot be {what} \({reason}.*\.$"):
            call()
    if isinstance(error, RuntimeError):
        return
    told = rf"{reason.partition(chr(92))[0]}.*'s3://bucket/data/x'"
    with pytest.raises(OSError, match=told):
        folder.write_bytes(b"", "x")

    def absent(path: str) -> None:
        raise FileNotFoundError(path)

    folder.fs.info = absent  # the store answers again
    with pytest.raises(OSError, match=told):
        folder.create(b"", "x")


def test_what_a_local_disk_raises_is_one_sentence(tmp_path: Path):
    folder = open_folder(str(tmp_path))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for name, told in (
        ("folder", "is a folder, not a file"),
        ("loop", "Too many levels of symbolic links"),
        ("x" * 300, "File name too long"),
        ("pipe", "not a regular file"),
    ):
        for read in (folder.read_bytes, folder.open, folder.size, folder.sha256):
            with pytest.raises(InputError, match=told):
                read(name)
    for name in ("absent", "file/inside"):
        with pytest.raises(FileNotFoundError):
            folder.read_bytes(name)
    denied = Folder(Failing(PermissionError(13, "Permission denied")), str(tmp_path), local=True)
    with pytest.raises(InputError, match=r"file' cannot be read \(Permission denied\); check the path and its permiss"):
        denied.read_bytes("file")
