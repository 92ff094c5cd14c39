"""The prepared dataset: what `distrec prepare` writes and everything else reads.

```
manifest.json                      written last: a folder without it is an unfinished prepare
interactions/{train,valid,test}/part-00000.parquet   user, item: int32; timestamp: int64. Some splits also have
                                   `interactions/context/`: known before valid and test, never trained on
users.parquet, items.parquet       index: int32; original: string; items also have title: string (nullable)
features/<name>/part-00000.parquet item: int32; vector: fixed-size list of float16/32; missing: bool;
                                   a token set (several vectors per item) also has count: int32
content/part-00000.parquet         item: int32; text: string (nullable); image: binary (nullable)
```

Users and items are numbered from 0. Feature and content parts hold all items in index order. In a token set, `vector`
is the concatenation of an item's tokens. The first `count` tokens are real; the others are zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distrec.config import digest, nearest
from distrec.data.manifest import FeatureEntry, FileEntry, Manifest, Split, read_manifest
from distrec.data.opening import Defect, damaged, first_defect, reading_parquet
from distrec.data.parquet import open_parquet, parquet_bytes
from distrec.data.storage import Folder, open_folder, sha256
from distrec.errors import InputError

_BYTES_PER_GROUP = 8 << 20
_NULLABLE = ("title", "text", "image")  # in other columns, a null is damage


@dataclass(frozen=True)
class Interactions:
    """Rows of one split, sorted by user, then time, then order in the source. All arrays are `[rows]`."""

    user: np.ndarray
    item: np.ndarray
    timestamp: np.ndarray

    def __len__(self) -> int:
        return len(self.user)


@dataclass(frozen=True)
class FeatureRows:
    """Consecutive rows of a feature set, from one row group of `part`.

    Attributes:
        part: the file.
        first: the item of the first row.
        values: `[rows, tokens * width]` in the set's dtype; all finite.
        missing: `[rows]` bool.
        count: `[rows]` int32, the number of real vectors: 0 where missing, otherwise from 1 to `tokens`.
    """

    part: str
    first: int
    values: np.ndarray
    missing: np.ndarray
    count: np.ndarray


class Dataset:
    """Read access to a prepared dataset."""

    def __init__(self, folder: Folder, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self.users, self.items = manifest.users, manifest.items

    @classmethod
    def open(cls, path: str, checked: bool = False) -> Dataset:
        """Open the prepared dataset at a local path or `s3://` prefix.

        Args:
            path: where it is.
            checked: True: read only the manifest, because this process or the one that started it has opened the
                dataset before; False: also check every file's footer (`distrec.data.opening`).

        Raises:
            InputError: there is no dataset, its prepare did not finish, its format is another one, or a file does not
                agree with the manifest.
        """
        folder = open_folder(path)
        data = cls(folder, read_manifest(folder, path))
        if not checked and (defect := data.defect()):
            raise data.error(defect)
        return data

    def defect(self, encoded: bool = True) -> Defect | None:
        """The first defect that shows in manifest and footers; see `first_defect`."""
        return first_defect(self.folder, self.manifest, encoded)

    def error(self, defect: Defect) -> InputError:
        """The error about a defect of this dataset."""
        return damaged(self.folder, self.manifest, defect)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the manifest's content: the dataset's identity."""
        return digest(self.manifest.model_dump())

    def read_table(self, name: str, verify: bool = True) -> pa.Table:
        """Read one file of the manifest as a table.

        Raises:
            InputError: the file is missing, damaged or, with `verify`, does not match its recorded SHA-256.
        """
        entry = self.manifest.files[name]
        with reading_parquet(self.folder, self.manifest, name):
            data = self.folder.read_bytes(*name.split("/"))
            if verify and sha256(data) != entry.sha256:
                raise self.error(
                    Defect(
                        name,
                        f"checksum of '{name}' differs from manifest.json ({len(data)} bytes, expected {entry.bytes})",
                    )
                )
            # Arrow's threads can outlive the call and then need the interpreter, which aborts a process that is ending.
            return _whole(pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False), entry.rows)

    def row_groups(
        self, parts: Sequence[str], columns: list[str], wanted: Callable[[int, int], bool] = lambda first, stop: True
    ) -> Iterator[tuple[str, int, pa.Table]]:
        """Read files that continue each other, one row group at a time.

        Args:
            parts: the files. Their rows are counted together, from 0.
            columns: the columns to read.
            wanted: whether to read the files and row groups that hold rows `first:stop`.

        Returns:
            For each row group: its file, the number of its first row, and its rows.

        Raises:
            InputError: a file is missing or damaged.
        """
        first = 0
        for part in parts:
            stop = first + self.manifest.files[part].rows
            if wanted(first, stop):
                with reading_parquet(self.folder, self.manifest, part):
                    file = open_parquet(self.folder, *part.split("/"))
                    rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                at = first
                for group, count in enumerate(rows):
                    if wanted(at, at + count):
                        with reading_parquet(self.folder, self.manifest, part):
                            table = _whole(file.read_row_group(group, columns=columns), count)
                        yield part, at, table
                    at += count
            first = stop

    def interactions(self, split: Split | Literal["context"]) -> Interactions:
        """All rows of a split or of the context, with user and item as int32 and timestamp as int64.

        Raises:
            InputError: a file is missing or damaged, an id is out of range, or the rows are not sorted.
        """
        names = self.manifest.parts(f"interactions/{split}")
        tables = [self._pairs(name) for name in names]
        if not tables:
            empty = np.empty(0, np.int32)
            return Interactions(empty, empty, np.empty(0, np.int64))
        table = pa.concat_tables(tables)
        rows = Interactions(*(table[column].to_numpy() for column in ("user", "item", "timestamp")))
        back = (np.diff(rows.user) < 0) | ((np.diff(rows.user) == 0) & (np.diff(rows.timestamp) < 0))
        if back.any():
            row = int(np.flatnonzero(back)[0]) + 1
            ends = np.cumsum([len(part) for part in tables])
            part = int(np.searchsorted(ends, row, "right"))
            what = f"'{names[part]}' row {row - ends[part] + len(tables[part])} is out of order (user, then time)"
            raise self.error(Defect(names[part], what))
        return rows

    def _pairs(self, name: str) -> pa.Table:
        table = self.read_table(name)
        for side, bound in (("user", self.users), ("item", self.items)):
            ids = table[side].to_numpy()
            wrong = (ids < 0) | (ids >= bound)
            if wrong.any():
                row = int(np.flatnonzero(wrong)[0])
                what = f"'{name}' row {row} has {side} {ids[row]} but manifest.json counts {bound} {side}s"
                raise self.error(Defect(name, what))
        return table

    def feature(self, name: str) -> FeatureEntry:
        """The entry of a feature set.

        Raises:
            InputError: there is no feature set of that name.
        """
        if name not in self.manifest.features:
            known = list(self.manifest.features)
            hint = nearest(name, known) if known else "the dataset has no features; run 'distrec encode' or import some"
            raise InputError(f"data '{self.folder}' has no feature '{name}'; {hint}.")
        return self.manifest.features[name]

    def feature_rows(self, name: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows `start:stop` of a set: values `[rows, width]` float32 (zeros where missing) and missing `[rows]` bool.

        Reads only the row groups that hold these rows.

        Raises:
            InputError: there is no such set, it has several vectors per item, a file is damaged, or a number is NaN or
                infinite.
        """
        entry = self.feature(name)
        if entry.tokens > 1:
            raise InputError(
                f"data '{self.folder}': feature '{name}' has {entry.tokens} vectors per item but one is needed; "
                "name a set that 'distrec encode' writes without --tokens."
            )
        values = np.zeros((max(stop - start, 0), entry.width), np.float32)
        missing = np.zeros(len(values), bool)
        for rows in self.feature_groups(name, start, stop):
            at = slice(rows.first - start, rows.first - start + len(rows.values))
            values[at], missing[at] = rows.values, rows.missing
        values[missing] = 0
        return values, missing

    def token_rows(self, name: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows `start:stop` of a token set. Reads only the row groups that hold these rows.

        Returns:
            Values `[rows, tokens, width]` float16, zeros where an item is missing and after its real tokens; the number
            of real tokens, which come first, `[rows]` int32; missing `[rows]` bool.

        Raises:
            InputError: there is no such set, it has one vector per item, a file is damaged, or a number is NaN or
                infinite.
        """
        entry = self.feature(name)
        if entry.tokens == 1:
            raise InputError(
                f"data '{self.folder}': feature '{name}' has one vector per item but several are needed; name a "
                "set that 'distrec encode --tokens' writes."
            )
        values = np.zeros((max(stop - start, 0), entry.tokens, entry.width), np.float16)
        count = np.zeros(len(values), np.int32)
        missing = np.zeros(len(values), bool)
        for rows in self.feature_groups(name, start, stop):
            at = slice(rows.first - start, rows.first - start + len(rows.values))
            values[at] = rows.values.reshape(-1, entry.tokens, entry.width)
            count[at], missing[at] = rows.count, rows.missing
        values[missing], count[missing] = 0, 0
        return values, count, missing

    def feature_groups(self, name: str, start: int, stop: int) -> Iterator[FeatureRows]:
        """Rows `start:stop` of a feature set, one row group at a time, checked.

        Raises:
            InputError: a file is damaged, its items are not in order, a number is NaN or infinite, or `count` does not
                agree with `missing`.
        """
        entry = self.feature(name)
        columns = ["item", "vector", "missing", *(["count"] if entry.tokens > 1 else [])]

        def wanted(first: int, end: int) -> bool:
            return max(first, start) < min(end, stop)

        for part, at, table in self.row_groups(entry.parts, columns, wanted):
            low, high = max(at, start), min(at + table.num_rows, stop)
            yield self._feature_rows(name, part, low, table.slice(low - at, high - low))

    def _feature_rows(self, name: str, part: str, first: int, table: pa.Table) -> FeatureRows:
        entry = self.feature(name)
        self._require_order(part, table, "item", first)
        with reading_parquet(self.folder, self.manifest, part):
            values = vectors(table["vector"], entry.tokens * entry.width)
        if not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            correct = "" if entry.encoded else f"correct {entry.source!r} and "
            raise InputError(
                f"data '{self.folder}': '{part}' item {first + row}: feature {column} is {values[row, column]}; "
                f"{correct}{entry.remedy(name, self.folder)}."
            )
        missing = table["missing"].to_numpy()
        count = table["count"].to_numpy() if entry.tokens > 1 else (~missing).astype(np.int32)
        wrong = (count < 0) | (count > entry.tokens) | ((count == 0) != missing)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise InputError(
                f"data '{self.folder}': '{part}' item {first + row}: {count[row]} of {entry.tokens} tokens are "
                f"real but 'missing' is {bool(missing[row])}; {entry.remedy(name, self.folder)}."
            )
        return FeatureRows(part, first, values, missing, count)

    def _require_order(self, name: str, table: pa.Table, column: str, first: int) -> None:
        """Refuse rows whose numbers in `column` are not `first`, `first + 1`, …"""
        last = first + table.num_rows
        if not np.array_equal(table[column].to_numpy(), np.arange(first, last)):
            raise self.error(Defect(name, f"'{name}' column '{column}' is not {first} to {last - 1} in order"))

    def missing(self, name: str) -> np.ndarray:
        """Which items lack feature set `name`, `[items]` bool.

        Raises:
            InputError: a file is damaged.
        """
        tables = (table for _, _, table in self.row_groups(self.feature(name).parts, ["missing"]))
        return np.concatenate([table["missing"].to_numpy() for table in tables])

    def content(self, columns: list[str]) -> Iterator[pa.Table]:
        """Stream raw content in item order, as tables with `item` and those of `text` and `image` in `columns`.

        Raises:
            InputError: a file is damaged, or its items are not in order.
        """
        for part, first, rows in self.row_groups(self.manifest.parts("content"), ["item", *columns]):
            self._require_order(part, rows, "item", first)
            yield rows

    def content_of(self, items: Sequence[int], columns: list[str]) -> Iterator[dict[str, Any]]:
        """Raw content of `items`, one dictionary each with `item` and `columns`, ascending by item.

        Reads only the row groups that hold these items. Errors as in `content`.
        """
        wanted = np.unique(np.asarray(items, np.int64))

        def mine(first: int, stop: int) -> np.ndarray:
            return wanted[(wanted >= first) & (wanted < stop)]

        parts = self.manifest.parts("content")
        for part, first, rows in self.row_groups(
            parts, ["item", *columns], lambda first, stop: len(mine(first, stop)) > 0
        ):
            self._require_order(part, rows, "item", first)
            yield from rows.take(pa.array(mine(first, first + rows.num_rows) - first)).to_pylist()

    def items_table(self) -> pa.Table:
        """`items.parquet`: index, original id, title."""
        return self._ids("items.parquet")

    def users_table(self) -> pa.Table:
        """`users.parquet`: index, original id."""
        return self._ids("users.parquet")

    def _ids(self, name: str) -> pa.Table:
        table = self.read_table(name)
        self._require_order(name, table, "index", 0)
        return table


def vectors(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """Convert a column of fixed-size lists to an array `[rows, width]` of the same float type.

    Raises:
        ValueError: a list or a number is null.
    """
    flat = [chunk.flatten() for chunk in column.chunks]
    if column.null_count or any(chunk.null_count for chunk in flat):
        raise ValueError("a vector is empty")
    chunks = [chunk.to_numpy(zero_copy_only=False).reshape(-1, width) for chunk in flat]
    return np.concatenate(chunks) if chunks else np.empty((0, width), np.float32)


def _whole(table: pa.Table, rows: int) -> pa.Table:
    """The table, if it has `rows` rows, valid values, and no nulls where none belong; otherwise a ValueError."""
    table.validate(full=True)
    empty = [name for name in table.column_names if name not in _NULLABLE and table[name].null_count]
    if table.num_rows != rows or empty:
        raise ValueError(f"it has {table.num_rows} of {rows} rows, and nulls in columns {empty}")
    return table


def vector_table(first_item: int, values: np.ndarray, missing: np.ndarray, count: np.ndarray | None = None) -> pa.Table:
    """Make a feature part for items `first_item`, `first_item + 1`, …

    Args:
        first_item: index of the first item.
        values: `[rows, width]` float16 or float32; for a token set `[rows, tokens * width]`.
        missing: `[rows]` bool.
        count: `[rows]` int32, the number of real tokens; only for a token set.
    """
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    items = np.arange(first_item, first_item + len(values), dtype=np.int32)
    columns = {"item": items, "vector": pa.FixedSizeListArray.from_arrays(flat, values.shape[1]), "missing": missing}
    return pa.table(columns if count is None else {**columns, "count": count})


def group_rows(row_bytes: int) -> int:
    """Rows per row group for rows of `row_bytes`: few for wide vectors, so that reading some items reads few others."""
    return max(1, min(65_536, _BYTES_PER_GROUP // row_bytes))


def write_part(folder: Folder, name: str, table: pa.Table, row_group_rows: int = 65_536) -> FileEntry:
    """Write one Parquet file of a dataset and return its manifest entry."""
    data = parquet_bytes(table, row_group_rows)
    folder.write_bytes(data, *name.split("/"))
    return FileEntry(rows=table.num_rows, bytes=len(data), sha256=sha256(data))
