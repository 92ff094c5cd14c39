"""The project's only access to files: one interface for local folders and `s3://` prefixes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import posixpath
import uuid
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from botocore.exceptions import BotoCoreError

from distrec.errors import InputError


@dataclass(frozen=True)
class Folder:
    """A folder on some filesystem. Credentials and endpoints come from the environment (`AWS_…`), not from configs."""

    fs: Any
    path: str
    local: bool

    def at(self, *parts: str) -> str:
        """The filesystem path of a file or folder inside this one."""
        return posixpath.join(self.path, *parts)

    def folder(self, *parts: str) -> Folder:
        """A subfolder."""
        return Folder(self.fs, self.at(*parts), self.local)

    def exists(self, *parts: str) -> bool:
        """Whether the folder, or the given path inside it, exists now; listings are not cached.

        Raises:
            InputError: the object store cannot be reached.
        """
        self.fs.invalidate_cache()
        try:
            return bool(self.fs.exists(self.at(*parts)))
        except BotoCoreError as error:  # no credentials or no endpoint; a refused request is an OSError
            raise InputError(
                f"'{self}' cannot be reached ({error}); check the endpoint and credentials in AWS_… variables."
            ) from None

    def names(self, *parts: str) -> list[str]:
        """Sorted names of the files and folders directly inside; empty if there are none."""
        if not self.exists(*parts):
            return []
        where = self.at(*parts)
        return sorted(posixpath.basename(path.rstrip("/")) for path in self.fs.ls(where, detail=False))

    def make(self) -> None:
        """Create the folder on a local disk. Object stores have no folders, and we never create a bucket."""
        if self.local:
            self.fs.makedirs(self.path, exist_ok=True)

    def remove(self, *parts: str) -> None:
        """Delete a file or folder inside this one, if it exists."""
        if self.exists(*parts):
            self.fs.rm(self.at(*parts), recursive=True)

    def copy(self, target: Folder, name: str) -> None:
        """Copy the file or folder `name`, if it exists, into folder `target` of the same filesystem."""
        if not self.exists(name):
            return
        source = self.at(name)
        for path in self.fs.find(source):  # fs.copy would treat '[' and '*' in paths as patterns
            copied = target.at(name) + path[len(source) :]
            if self.local:
                os.makedirs(os.path.dirname(copied), exist_ok=True)
            self.fs.cp_file(path, copied)

    def read_bytes(self, *parts: str) -> bytes:
        """The whole content of a file."""
        return bytes(self.fs.cat_file(self.at(*parts)))

    def write_bytes(self, data: bytes, *parts: str) -> None:
        """Write a file atomically: readers see the old content or the new, never a part of it."""
        target = self.at(*parts)
        if not self.local:  # a PUT of one object is atomic
            self.fs.pipe_file(target, data)
            return
        os.makedirs(os.path.dirname(target), exist_ok=True)
        draft = f"{target}.{uuid.uuid4().hex[:8]}.part"
        with open(draft, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)

    def create(self, data: bytes, *parts: str) -> bool:
        """Write a file that must not exist yet. Of several processes that try at once, one succeeds.

        Returns:
            Whether the file was written. On a local disk, readers may see a part of it while it is written.
        """
        target = self.at(*parts)
        if self.local:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            try:
                with open(target, "xb") as file:
                    file.write(data)
            except FileExistsError:
                return False
            return True
        try:
            self.fs.pipe_file(target, data, mode="create")
        except OSError as error:  # which one says that the object exists depends on the store
            if self.exists(*parts):
                return False
            if error.errno != errno.ENOSYS:
                raise
            self.fs.pipe_file(target, data)  # the store has no conditional writes
        return True

    def read_json(self, *parts: str) -> Any:
        """The value in a JSON file."""
        return json.loads(self.read_bytes(*parts))

    def write_json(self, value: Any, *parts: str) -> None:
        """Write a JSON file atomically."""
        self.write_bytes((json.dumps(value, indent=2) + "\n").encode(), *parts)

    def __str__(self) -> str:
        return self.path if self.local else f"s3://{self.path}"


def open_folder(path: str) -> Folder:
    """The folder at a local path or an `s3://` URL; it need not exist.

    Raises:
        InputError: the URL's protocol is unknown, or the package for it is not installed.
    """
    if "://" not in path:
        return Folder(fsspec.filesystem("file"), os.path.abspath(os.path.expanduser(path)), local=True)
    try:
        fs, inner = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise InputError(f"path '{path}' cannot be opened ({error}); use a local path or an s3:// URL.") from None
    return Folder(fs, inner.rstrip("/"), local=fs.protocol in ("file", ("file", "local")))


def located(path: str) -> str:
    """Make a local path absolute, for processes with another working folder. A URL stays unchanged."""
    return path if "://" in path else os.path.abspath(path)


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def parquet_bytes(table: pa.Table, row_group_rows: int = 65_536, dictionary: bool = True) -> bytes:
    """The bytes of a Parquet file with `table`; `dictionary` stores repeated values once."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=row_group_rows, use_dictionary=dictionary)
    return sink.getvalue().to_pybytes()


def open_parquet(folder: Folder, *parts: str) -> pq.ParquetFile:
    """Open a Parquet file inside `folder`; row groups are read when asked for."""
    return pq.ParquetFile(folder.fs.open(folder.at(*parts), "rb"))
