"""A source folder: find files by name or pattern, read them as tables, and hash all that was read."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import posixpath
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from distrec.config import nearest
from distrec.data.importers.delimited import column_names, read_delimited
from distrec.data.importers.formats import Files, Form, TableFiles, actual, closest, form, repeated
from distrec.data.importers.jsonlines import read_json_lines
from distrec.data.importers.rows import Rows, Span
from distrec.data.importers.text import first_line, unreadable
from distrec.data.storage import Folder, open_folder
from distrec.errors import InputError

__all__ = ["Files", "Rows", "Source", "Span", "TableFiles", "unreadable"]

_PLAIN = TableFiles(files=[])


class Source:
    """Read access to the folder given as `--source`. Remote files are fetched once, into folder `scratch`.

    Raises:
        InputError: the folder does not exist or cannot be read.
    """

    def __init__(self, path: str, scratch: Path):
        self.folder: Folder = open_folder(path)
        self.scratch = scratch
        self._used: set[str] = set()
        self._listed: dict[str, int] = {}
        try:
            found = self.folder.exists()
        except Exception as error:  # whatever the object store's client raises: no endpoint, no credentials, …
            raise InputError(f"source '{path}' cannot be read ({error}); check the address and credentials.") from None
        if not found:
            raise InputError(f"source '{path}' does not exist; give the folder that holds the raw files.")
        if self.folder.local and not os.path.isdir(self.folder.path):
            raise InputError(f"source '{path}' is a file; give the folder that holds it.")

    def files(self, patterns: Iterable[str], key: str) -> list[str]:
        """Names inside the source that match `patterns`, in the order of the patterns and by name within each.

        Every part of a path may be a pattern. Symbolic links are followed.

        Raises:
            InputError: a name leads out of the source, a pattern matches no file, or a match cannot be read.
        """
        found: list[str] = []
        for pattern in patterns:
            self.require_inside(pattern, key)
            matches = self._matches(pattern, key)
            files = [name for name in matches if not self._is_folder(name)]
            if not files:
                inside = posixpath.join(matches[0], "*")
                raise InputError(f"key '{key}': '{matches[0]}' is a folder; name its files, for example '{inside}'.")
            for name in files:
                self._check_file(name)
            found += files
        if not found:
            raise InputError(f"key '{key}' is empty; name at least one file.")
        self._used.update(found)
        return list(dict.fromkeys(found))

    def require_inside(self, name: str, key: str) -> None:
        """Refuse a name or pattern that is absolute, or that leads out of the source with `..`."""
        parts = name.split("/")
        if not name or "\0" in name or name.startswith("/") or "://" in name or ".." in parts or name.strip("./") == "":
            raise InputError(
                f"key '{key}': '{name}' is not a name inside the source '{self.folder}'; give one relative to it, "
                "without '..'."
            )

    def _matches(self, pattern: str, key: str) -> list[str]:
        """Names of files and folders that match, sorted."""
        found = [""]
        parts = [part for part in pattern.split("/") if part not in ("", ".")]
        for depth, part in enumerate(parts, 1):
            there = [(folder, name) for folder in found for name in self._names(folder)]
            matches = [posixpath.join(folder, n) for folder, n in there if n == part or fnmatch.fnmatchcase(n, part)]
            folders = matches if depth == len(parts) else [name for name in matches if self._is_folder(name)]
            if not folders:
                names = sorted({name for _, name in there})
                hint = f"'{matches[0]}' is not a folder" if matches else "the folder is empty"
                if not matches and names:
                    hint = nearest(part, names)
                if not matches and found != [""]:
                    hint = f"no '{part}' in '{found[0]}'{' and others' if len(found) > 1 else ''}, {hint}"
                raise InputError(f"key '{key}': no file '{pattern}' in source '{self.folder}'; {hint}.")
            found = folders
        return sorted(found)

    def _is_folder(self, name: str) -> bool:
        path = self.folder.at(name)
        return os.path.isdir(path) if self.folder.local else self.folder.fs.info(path)["type"] == "directory"

    def _names(self, folder: str) -> list[str]:
        try:
            return self.folder.names(folder) if folder else self.folder.names()
        except OSError as error:
            raise unreadable(folder or str(self.folder), "a folder", error) from None

    def _check_file(self, name: str) -> None:
        """Refuse what is not a readable file, such as a pipe or a link that leads nowhere or to itself."""
        if not self.folder.local:
            return
        path = self.folder.at(name)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise InputError(f"file '{name}' is a device or pipe; give a regular file.")
            with open(path, "rb"):
                pass
        except OSError as error:
            raise unreadable(name, "file", error) from None

    def has(self, name: str) -> bool:
        """Whether the source holds a file of that name."""
        return self.folder.exists(name)

    def local(self, name: str) -> str:
        """The path of a local copy of file `name`; a local source's own file."""
        if self.folder.local:
            return self.folder.at(name)
        copy = self.scratch / "source" / name
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            self.folder.fs.get_file(self.folder.at(name), str(copy))
        return str(copy)

    def sizes(self, names: Iterable[str], where: str) -> dict[str, int]:
        """Size in bytes of those of the files `names` that exist, all below folder `where`; they enter the digest.

        On a local disk, links are followed, to files and to folders.
        """
        if self.folder.local:
            found = {name: size for name in names if (size := _size(self.folder.at(name))) is not None}
        else:
            there = self.folder.fs.find(self.folder.at(where), detail=True)
            listed = {posixpath.relpath(path, self.folder.path): int(info["size"]) for path, info in there.items()}
            found = {name: listed[name] for name in names if name in listed}
        self._listed.update(found)
        return found

    def digest(self) -> str:
        """SHA-256 over names and contents of the files used, and over names and sizes of the images."""
        lines = [f"{name} {self.folder.sha256(name)}" for name in sorted(self._used)]
        lines += [f"{name} {size} bytes" for name, size in sorted(self._listed.items())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def parquet(self, name: str, columns: Sequence[str]) -> pq.ParquetFile:
        """Open Parquet file `name`, which must have `columns`; only its footer is read.

        Raises:
            InputError: the file is not Parquet, is damaged, or lacks a column.
        """
        try:
            file = pq.ParquetFile(self.local(name))
        except (pa.ArrowException, OSError) as error:
            raise unreadable(name, "parquet", error) from None
        twice = repeated(file.schema_arrow.names)
        if twice is not None:
            raise InputError(f"file '{name}' has two columns named '{twice}'; give each a name of its own.")
        for column in columns:
            if column not in file.schema_arrow.names:
                raise InputError(f"file '{name}' has no column '{column}'; {closest(column, file.schema_arrow.names)}.")
        return file

    def columns(self, name: str) -> list[str]:
        """The column names of a file of delimited text.

        Raises:
            InputError: the file is not readable.
        """
        return column_names(self.local(name), form(name, _PLAIN, ""))

    def batches(self, name: str, columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
        """Stream the `columns` of Parquet file `name` in batches of at most `rows` rows."""
        file = self.parquet(name, columns)
        try:
            yield from file.iter_batches(rows, columns=list(columns))
        except (pa.ArrowException, OSError) as error:
            raise unreadable(name, "parquet", error) from None

    def table(self, names: Sequence[str], columns: Sequence[str], options: TableFiles = _PLAIN, key: str = "") -> Rows:
        """The `columns` of all files `names`, concatenated. All columns of delimited text are strings.

        Args:
            names: Files inside the source.
            columns: Names of the columns to read.
            options: How to read files of text.
            key: Dotted config key of the options, for messages; empty if they cannot be set.

        Raises:
            InputError: a file is of another kind, is damaged, or lacks a column, or the types of a column differ.
        """
        columns = list(dict.fromkeys(columns))
        parts = [self._table(form(name, options, key), columns) for name in names]
        try:
            table = pa.concat_tables([part.table for part in parts], promote_options="permissive")
        except pa.ArrowException as error:
            raise InputError(
                f"files {', '.join(names)}: columns differ in type ({first_line(error)}); make them equal."
            ) from None
        return Rows(
            table,
            [file for part in parts for file in part.files],
            typed=all(part.typed for part in parts),
            spans=[span for part in parts for span in part.spans],
            notes=[note for part in parts for note in part.notes],
        )

    def _table(self, file: Form, columns: Sequence[str]) -> Rows:
        path = self.local(file.name)
        if file.kind == "delimited":
            return read_delimited(path, file, columns)
        if file.kind == "json":
            return read_json_lines(path, file, columns)
        try:
            there = self.parquet(file.name, []).schema_arrow.names
            chosen = [actual(column, there) or column for column in columns]
            read = self.parquet(file.name, chosen).read(columns=list(dict.fromkeys(chosen)))
            table = pa.table([read[name] for name in chosen], names=list(columns))
        except (pa.ArrowException, OSError) as error:
            raise unreadable(file.name, "parquet", error) from None
        count = table.num_rows
        return Rows(table, [(file.name, count)], typed=True, spans=[Span(file.name, range(count))])


def _size(path: str) -> int | None:
    """Size of the regular file at `path` in bytes; None if there is none."""
    try:
        info = os.stat(path)
    except (OSError, ValueError):  # ValueError: the path has a NUL character
        return None
    return info.st_size if stat.S_ISREG(info.st_mode) else None
