"""The project's only access to files: one interface for local folders and `s3://` prefixes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import posixpath
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from botocore.exceptions import BotoCoreError

from distrec.config.paths import REMOTE, located
from distrec.errors import InputError, StorageError


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
            InputError: the storage cannot be read.
        """
        self.fs.invalidate_cache()
        with self.reading(*parts):
            return bool(self.fs.exists(self.at(*parts)))

    def is_file(self) -> bool:
        """Whether the path is not a folder's but a file's."""
        with self.reading():
            return bool(self.fs.isfile(self.path))

    def names(self, *parts: str) -> list[str]:
        """Sorted names of the files and folders directly inside; empty if there are none.

        Raises:
            InputError: the storage cannot be read.
        """
        if not self.exists(*parts):
            return []
        with self.reading(*parts):
            found = self.fs.ls(self.at(*parts), detail=False)
        return sorted(posixpath.basename(path.rstrip("/")) for path in found)

    def make(self) -> None:
        """Create the folder on a local disk. Object stores have no folders, and we never create a bucket."""
        if self.local:
            self.fs.makedirs(self.path, exist_ok=True)

    def in_the_way(self) -> str | None:
        """What keeps a local folder from being made: the path of a file that is there, or above it; None if nothing."""
        path = self.path if self.local else ""
        while path and not os.path.isdir(path):
            if os.path.lexists(path):
                return path
            path = os.path.dirname(path)
        return None

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

    @contextmanager
    def reading(self, *parts: str) -> Iterator[None]:
        """A context that reads the folder or a path inside it.

        Raises:
            FileNotFoundError: there is no such path; a file in place of a folder on the way counts as that too.
            InputError: there is a folder in place of a file.
            StorageError: the storage cannot be read: rights, a loop of links, no connection.
        """
        where = self.folder(*parts) if parts else self
        try:
            yield
        except (InputError, FileNotFoundError, pa.ArrowException):
            raise
        except NotADirectoryError as error:
            raise FileNotFoundError(*error.args) from None
        except IsADirectoryError:
            raise InputError(f"'{where}' is a folder, not a file; remove it or correct the path.") from None
        except OSError as error:
            if type(error) is OSError and error.errno is None:
                raise  # pyarrow raises this about the content of a file
            place = "path and its permissions" if self.local else "address and the rights of the credentials"
            reason = error.strerror or str(error) or type(error).__name__
            raise StorageError(f"'{where}' cannot be read ({reason}); check the {place}.") from None
        except Exception as error:
            if self.local:
                raise
            # Whatever the object store's client raises: no credentials, no endpoint, a dropped connection.
            raise StorageError(
                f"'{where}' cannot be reached ({str(error) or type(error).__name__}); check the endpoint and "
                "credentials in AWS_… variables."
            ) from None

    def open(self, *parts: str) -> Any:
        """Open a file for reading, as a binary stream with attribute `size`.

        Raises:
            FileNotFoundError: there is no such file.
            InputError: the storage cannot be read.
        """
        with self.reading(*parts):
            self._require_file(*parts)
            return self.fs.open(self.at(*parts), "rb")

    def size(self, *parts: str) -> int:
        """Size of a file in bytes; errors as in `open`."""
        with self.open(*parts) as file:
            return int(file.size)

    def read_bytes(self, *parts: str) -> bytes:
        """The whole content of a file; errors as in `open`."""
        with self.reading(*parts):
            self._require_file(*parts)
            return bytes(self.fs.cat_file(self.at(*parts)))

    def sha256(self, *parts: str) -> str:
        """Hexadecimal SHA-256 of a file, which is read in blocks; errors as in `open`."""
        hasher = hashlib.sha256()
        with self.reading(*parts), self.open(*parts) as file:
            while block := file.read(1 << 22):
                hasher.update(block)
        return hasher.hexdigest()

    def _require_file(self, *parts: str) -> None:
        """Refuse what a local read would wait for or read without end, such as a pipe or a device."""
        if self.local and not stat.S_ISREG(mode := os.stat(self.at(*parts)).st_mode) and not stat.S_ISDIR(mode):
            raise OSError(errno.EINVAL, "not a regular file")

    def write_bytes(self, data: bytes, *parts: str) -> None:
        """Write a file atomically: readers see the old content or the new, never a part of it.

        Raises:
            OSError: the file cannot be written.
        """
        target = self.at(*parts)
        if not self.local:  # a PUT of one object is atomic
            self._put(target, data)
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

        Raises:
            OSError: the file cannot be written.
            StorageError: as `exists`, after a failed write to an object store.
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
            self._put(target, data, "create")
        except OSError as error:  # which one says that the object exists depends on the store
            if self.exists(*parts):
                return False
            if error.errno != errno.ENOSYS:
                raise
            self._put(target, data)  # the store has no conditional writes
        return True

    def _put(self, target: str, data: bytes, mode: str = "overwrite") -> None:
        try:
            self.fs.pipe_file(target, data, mode=mode)
        except BotoCoreError as error:  # no credentials or no endpoint; a refused request is an OSError
            raise OSError(f"'{self}' cannot be reached: {error}") from None

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
        InputError: as in `located`.
    """
    place = located(path)
    if place.startswith(REMOTE):
        # Other processes write to the same folders, so a listing must not be remembered.
        return Folder(
            fsspec.filesystem("s3", use_listings_cache=False), place.removeprefix(REMOTE).rstrip("/"), local=False
        )
    return Folder(fsspec.filesystem("file"), place, local=True)


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
    return pq.ParquetFile(folder.open(*parts))
