"""A source folder: find files by name or pattern, read them as tables, and hash all that was read."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import posixpath
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from pydantic import BeforeValidator

from distrec.config import nearest
from distrec.data.storage import Folder, open_folder
from distrec.errors import InputError

Files = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""Config type: one file name, a list of them, or patterns such as `posters-*.parquet`."""

_DELIMITERS = {".csv": ",", ".tsv": "\t", ".inter": "\t"}


@dataclass(frozen=True)
class Rows:
    """A table read from one or more files, with the origin of each row."""

    table: pa.Table
    files: list[tuple[str, int]]  # name, rows
    typed: bool  # Parquet declares the types of its columns; ids from CSV are read as text first

    def at(self, row: int) -> str:
        """Name row `row` of the table by its file and its number in that file, counted from 0."""
        for name, count in self.files:
            if row < count:
                return f"'{name}' row {row}"
            row -= count
        raise IndexError(row)

    @property
    def name(self) -> str:
        """The file's name, or the first name and how many more there are."""
        return f"'{self.files[0][0]}'" + (f" and {len(self.files) - 1} more" if len(self.files) > 1 else "")


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

    def files(self, patterns: Iterable[str], key: str) -> list[str]:
        """Names inside the source that match `patterns`, in the order of the patterns and by name within each.

        Raises:
            InputError: a pattern matches nothing.
        """
        found: list[str] = []
        for pattern in patterns:
            where, last = posixpath.split(pattern)
            there = self.folder.names(where)
            matches = [posixpath.join(where, name) for name in there if name == last or fnmatch.fnmatchcase(name, last)]
            if not matches:
                raise InputError(
                    f"key '{key}': no file '{pattern}' in source '{self.folder}'; "
                    f"{nearest(last, there) if there else 'the folder is empty'}."
                )
            found += matches
        self._used.update(found)
        return list(dict.fromkeys(found))

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
        lines = [f"{name} {file_sha256(self.folder, name)}" for name in sorted(self._used)]
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
        _require(name, columns, file.schema_arrow.names)
        return file

    def columns(self, name: str) -> list[str]:
        """The column names of a CSV, TSV or Parquet file.

        Raises:
            InputError: the file is of another kind or damaged.
        """
        kind = posixpath.splitext(name)[1]
        if kind == ".parquet":
            return list(self.parquet(name, ()).schema_arrow.names)
        if kind not in _DELIMITERS:
            raise InputError(f"file '{name}' is not a table of a known kind; give .parquet, .csv or .tsv.")
        try:
            with open(self.local(name), "rb") as lines:
                header = lines.readline()
            return list(pa.csv.read_csv(pa.BufferReader(header), parse_options=_parse(kind)).column_names)
        except (pa.ArrowException, OSError) as error:
            raise unreadable(name, kind[1:], error) from None

    def batches(self, name: str, columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
        """Stream the `columns` of Parquet file `name` in batches of at most `rows` rows."""
        file = self.parquet(name, columns)
        try:
            yield from file.iter_batches(rows, columns=list(columns))
        except (pa.ArrowException, OSError) as error:
            raise unreadable(name, "parquet", error) from None

    def table(self, names: Sequence[str], columns: Sequence[str], text: Sequence[str] = ()) -> Rows:
        """The `columns` of all files `names`, concatenated. In CSV and TSV, `text` columns stay strings.

        Raises:
            InputError: a file is of another kind, is damaged, or lacks a column, or the types of a column differ.
        """
        columns = list(dict.fromkeys(columns))
        parts = [self._table(name, columns, text) for name in names]
        try:
            table = pa.concat_tables(parts, promote_options="permissive")
        except pa.ArrowException as error:
            raise InputError(
                f"files {', '.join(names)}: columns differ in type ({_first_line(error)}); make them equal."
            ) from None
        counts = [(name, part.num_rows) for name, part in zip(names, parts)]
        return Rows(table, counts, typed=all(name.endswith(".parquet") for name in names))

    def _table(self, name: str, columns: Sequence[str], text: Sequence[str]) -> pa.Table:
        kind = posixpath.splitext(name)[1]
        _require(name, columns, self.columns(name))
        convert = pa.csv.ConvertOptions(
            include_columns=list(columns),
            column_types=dict.fromkeys(text, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
        )
        try:
            if kind == ".parquet":
                return self.parquet(name, columns).read(columns=list(columns))
            return pa.csv.read_csv(self.local(name), parse_options=_parse(kind), convert_options=convert)
        except (pa.ArrowException, OSError) as error:
            raise unreadable(name, kind[1:], error) from None


def unreadable(name: str, kind: str, error: Exception) -> InputError:
    """The error for a file whose content does not match its file type."""
    return InputError(f"file '{name}' is not readable as {kind} ({_first_line(error)}); fix or replace it.")


def _size(path: str) -> int | None:
    """Size of the regular file at `path` in bytes; None if there is none."""
    try:
        info = os.stat(path)
    except (OSError, ValueError):  # ValueError: the path has a NUL character
        return None
    return info.st_size if stat.S_ISREG(info.st_mode) else None


def file_sha256(folder: Folder, name: str) -> str:
    """SHA-256 of a file inside `folder`, streamed."""
    hasher = hashlib.sha256()
    with folder.fs.open(folder.at(name), "rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
    return hasher.hexdigest()


def _parse(kind: str) -> pa.csv.ParseOptions:
    return pa.csv.ParseOptions(delimiter=_DELIMITERS[kind], newlines_in_values=True)


def _require(name: str, columns: Sequence[str], there: Sequence[str]) -> None:
    for column in columns:
        if column not in there:
            raise InputError(f"file '{name}' has no column '{column}'; {nearest(column, there)}.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
