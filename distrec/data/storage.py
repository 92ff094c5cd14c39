"""The project's only access to files: one interface for local folders and `s3://` prefixes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import posixpath
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
from botocore.exceptions import BotoCoreError

from distrec.config.paths import REMOTE, located
from distrec.data.refusals import Unanswered, code_of, is_full, reason_of, remedy_of
from distrec.errors import InputError, StorageError, StorageFull

_ROOMLESS = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up"}
_SINGLE = 32 << 20  # bytes: larger files go to an object store in parts
_DENIED = ("400", "401", "403")  # all that a refused HEAD request says


@dataclass(frozen=True)
class Folder:
    """A folder on some filesystem. Credentials and endpoints are botocore's (`AWS_…`, a profile), not in configs.

    An object store that throttles, fails, stalls or cannot be reached is asked again for two minutes before an
    operation raises an error; what a wait cannot mend, such as missing rights, is raised at once (`distrec.data.s3`).
    """

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
            return self._type(*parts) is not None

    def is_file(self) -> bool:
        """Whether the path is not a folder's but a file's."""
        with self.reading():
            return self._type() == "file"

    def _type(self, *parts: str) -> str | None:
        """The kind of what is there, such as "file"; None if nothing is. Unlike fsspec's `exists`, it raises."""
        try:
            return str(self.fs.info(self.at(*parts))["type"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:  # a link that leads nowhere
                return None
            raise

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
        with target.storing(name):
            for path in self.fs.find(source):  # fs.copy would treat '[' and '*' in paths as patterns
                copied = target.at(name) + path[len(source) :]
                if self.local:
                    os.makedirs(os.path.dirname(copied), exist_ok=True)
                try:
                    self.fs.cp_file(path, copied)
                except OSError:
                    if self.local:
                        with suppress(OSError):
                            os.remove(copied)
                    raise

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
        except FileNotFoundError as error:
            if code_of(error) == "NoSuchBucket":
                raise StorageError(f"'{where}' cannot be read ({reason_of(error)}); {remedy_of(error, '')}.") from None
            raise
        except (InputError, pa.ArrowException):
            raise
        except NotADirectoryError as error:
            raise FileNotFoundError(*error.args) from None
        except IsADirectoryError:
            raise InputError(f"'{where}' is a folder, not a file; remove it or correct the path.") from None
        except Unanswered as error:
            raise StorageError(f"'{where}' cannot be reached ({error}); see whether the store is up.") from None
        except OSError as error:
            if type(error) is OSError and error.errno is None:
                raise  # pyarrow raises this about the content of a file
            told = error if self.local else self._told(error, *parts)
            place = "path and its permissions" if self.local else "address and the rights of the credentials"
            remedy = remedy_of(told, "list and read") or f"check the {place}"
            raise StorageError(f"'{where}' cannot be read ({reason_of(told)}); {remedy}.") from None
        except Exception as error:
            if self.local:
                raise
            # Whatever the object store's client raises: no credentials, an impossible endpoint, a dropped connection.
            remedy = remedy_of(error, "read") or "check the endpoint and credentials in AWS_… variables"
            raise StorageError(f"'{where}' cannot be reached ({reason_of(error)}); {remedy}.") from None

    def _told(self, error: OSError, *parts: str) -> OSError:
        """The error with the store's reason. The answer to a HEAD request has none, so this reads a byte to get it."""
        if code_of(error) in _DENIED:
            try:
                self.fs.cat_file(self.at(*parts), start=0, end=1)
            except OSError as told:
                return told if code_of(told) else error
        return error

    @contextmanager
    def storing(self, *parts: str, needed: int | None = None) -> Iterator[None]:
        """A context that writes a path inside the folder, for which `needed` bytes are needed.

        Raises:
            StorageFull: there is no room for them.
            OSError: with a reason and, from an object store, a remedy, and the path. TimeoutError: the store did not
                answer.
        """
        path = str(self.folder(*parts))
        try:
            yield
        except (OSError, BotoCoreError, ValueError) as error:
            number = getattr(error, "errno", None)
            if number in _ROOMLESS or is_full(error):
                asked = "" if needed is None else f"; {needed:,} bytes are needed"
                free = (
                    f"{',' if asked else ';'} {self.free_bytes():,} {'are' if asked else 'bytes are'} free"
                    if self.local
                    else ""
                )
                reason = _ROOMLESS.get(number or 0, "the store has no room left")
                told = f"'{path}' cannot be written, because {reason}{asked}{free}; make room there."
                raise StorageFull(told) from None
            if self.local or (isinstance(error, ValueError) and not isinstance(error, BotoCoreError)):
                raise
            if isinstance(error, Unanswered):
                raise TimeoutError(errno.ETIMEDOUT, f"{error}; see whether the store is up", path) from None
            remedy = remedy_of(error, "write")
            reason = reason_of(error) + (f"; {remedy}" if remedy else "")
            kind = errno.EACCES if isinstance(error, PermissionError) else number or errno.EIO
            raise OSError(kind, reason, path) from None

    def free_bytes(self) -> int:
        """Bytes that this user may still write to the disk of a local folder, which need not exist yet."""
        path = self.path
        while not os.path.isdir(path):
            path = os.path.dirname(path)
        return shutil.disk_usage(path).free

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

    def age(self, *parts: str) -> float:
        """Seconds since a file was written, at least, by the storage's own clock; 0 if that cannot be known.

        No clock of a host is compared: an object store tells its time with every answer, and a shared disk marks a
        file that is written now with it.
        """
        with suppress(OSError, InputError, BotoCoreError, ValueError):
            if not self.local:
                return max(0.0, self.fs.age(self.at(*parts)) or 0.0)
            draft = self.at(f"{uuid.uuid4().hex[:8]}.part")
            try:
                with open(draft, "xb") as file:
                    now = os.fstat(file.fileno()).st_mtime
            finally:
                with suppress(OSError):
                    os.remove(draft)
            return max(0.0, now - os.stat(self.at(*parts)).st_mtime)
        return 0.0

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
            StorageFull: there is no room for it.
            OSError: the file cannot be written.
        """
        if self.local or len(data) > _SINGLE:
            with self.writing(*parts, needed=len(data)) as file:
                file.write(data)
            return
        with self.storing(*parts, needed=len(data)):
            self.fs.pipe_file(self.at(*parts), data)  # a PUT of one object is atomic

    @contextmanager
    def writing(self, *parts: str, needed: int | None = None) -> Iterator[Any]:
        """A context that writes a file piece by piece, of `needed` bytes if they are known.

        The file appears, or replaces the old one, when the context ends. If it ends by an error, nothing appears, and
        the draft or the uploaded parts are removed. An object store gets parts of 32 MiB, one at a time, and about two
        of them are in memory.

        Raises:
            StorageFull: there is no room for it.
            OSError: the file cannot be written.
        """
        target = self.at(*parts)
        with self.storing(*parts, needed=needed):
            if not self.local:
                with self.fs.uploading(target) as file:
                    yield file
                return
            os.makedirs(os.path.dirname(target), exist_ok=True)
            draft = f"{target}.{uuid.uuid4().hex[:8]}.part"
            try:
                with open(draft, "wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(draft, target)
            except BaseException:
                with suppress(OSError):
                    os.remove(draft)
                raise

    def abort_uploads(self) -> int:
        """Remove the parts of files below this folder whose upload was never completed, and return how many files.

        Their writers must be dead: whoever holds a run's folder may call it, before its workers start. A store without
        this request, or without the right to it, keeps the parts.
        """
        return 0 if self.local else int(self.fs.abort_uploads(self.path))

    def create(self, data: bytes, *parts: str) -> bool:
        """Write a file that must not exist yet. Of several processes that try at once, one succeeds.

        Returns:
            Whether the file was written. On a local disk, readers may see a part of it while it is written. It is
            False, too, if an object store wrote it, its answer was lost, and the request was sent again.

        Raises:
            StorageFull: there is no room for it.
            OSError: the file cannot be written.
            StorageError: as `exists`, after a failed write to an object store.
        """
        target = self.at(*parts)
        with self.storing(*parts, needed=len(data)):
            if self.local:
                return self._create_local(data, target)
            try:
                self.fs.pipe_file(target, data, mode="create")
            except (Unanswered, PermissionError):
                raise
            except (OSError, BotoCoreError) as error:  # which one says that the object exists depends on the store
                if self.exists(*parts):
                    return False
                if getattr(error, "errno", None) != errno.ENOSYS:
                    raise
                self.fs.pipe_file(target, data)  # the store has no conditional writes
            return True

    @staticmethod
    def _create_local(data: bytes, target: str) -> bool:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        try:
            file = open(target, "xb")  # noqa: SIM115  # only an error after this one removes the file
        except FileExistsError:
            return False
        try:
            with file:
                file.write(data)
        except BaseException:
            os.remove(target)
            raise
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
        InputError: as in `located`.
    """
    place = located(path)
    if place.startswith(REMOTE):
        from distrec.data.s3 import S3  # takes a second to import

        # Other processes write to the same folders, so a listing must not be remembered.
        return Folder(S3(use_listings_cache=False), place.removeprefix(REMOTE).rstrip("/"), local=False)
    return Folder(fsspec.filesystem("file"), place, local=True)


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()
