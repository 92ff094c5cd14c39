"""Divide the rows of a prepared dataset into Parquet files (parts)."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from distrec.data.manifest import FileEntry
from distrec.data.parquet import parquet_bytes
from distrec.data.storage import Folder, sha256

ROWS_PER_PART = 1 << 22  # interactions
ITEMS_PER_PART = 65_536  # features and content
BYTES_PER_PART = 64 << 20


def items_per_part(row_bytes: int) -> int:
    """Number of items in a part whose rows have `row_bytes` each."""
    return max(1, min(ITEMS_PER_PART, BYTES_PER_PART // row_bytes))


class Parts:
    """Writes `<place>/part-00000.parquet`, `part-00001.parquet`, … of a dataset, each as soon as its rows are complete.

    Attributes:
        rows: rows per part. The last part may have fewer, and so may any part that reaches `most_bytes`.
        files: manifest entries by name, in order.

    Args:
        folder: the dataset's folder.
        place: the folder of the parts inside it.
        rows: rows per part.
        group_rows: rows per row group.
        most_bytes: a part also ends once its rows take this many bytes in memory; None: no limit.
        dictionary: see `parquet_bytes`.
        known: entries of existing files. File names then contain the start of the checksum, so that no file is ever
            overwritten, and a known file is not written again unless it is damaged.
    """

    def __init__(
        self,
        folder: Folder,
        place: str,
        rows: int,
        *,
        group_rows: int = 65_536,
        most_bytes: int | None = None,
        dictionary: bool = True,
        known: Mapping[str, FileEntry] | None = None,
    ):
        self.rows = rows
        self.files: dict[str, FileEntry] = {}
        self._folder, self._place, self._group_rows = folder, place, group_rows
        self._most_bytes, self._dictionary, self._known = most_bytes, dictionary, known
        self._waiting: list[pa.Table] = []
        self._held = self._bytes = 0  # rows and bytes that wait

    def add(self, table: pa.Table) -> None:
        """Append rows and write every part that is full."""
        self._waiting.append(table)
        self._held += table.num_rows
        self._bytes += table.nbytes
        while self._held >= self.rows:
            self._write(self.rows)
        if self._most_bytes is not None and self._bytes >= self._most_bytes:
            self._write(self._held)

    def close(self) -> dict[str, FileEntry]:
        """Write the remaining rows and return `files`."""
        if self._held:
            self._write(self._held)
        return self.files

    def _write(self, rows: int) -> None:
        waiting = pa.concat_tables(self._waiting)
        part, rest = waiting.slice(0, rows).combine_chunks(), waiting.slice(rows)
        self._waiting, self._held, self._bytes = [rest] if rest.num_rows else [], rest.num_rows, rest.nbytes
        data = parquet_bytes(part, self._group_rows, self._dictionary)
        entry = FileEntry(rows=rows, bytes=len(data), sha256=sha256(data))
        mark = "" if self._known is None else f"-{entry.sha256[:12]}"
        name = f"{self._place}/part-{len(self.files):05d}{mark}.parquet"
        if not self._is_there(name, entry):
            self._folder.write_bytes(data, *name.split("/"))
        self.files[name] = entry

    def _is_there(self, name: str, entry: FileEntry) -> bool:
        """Whether the file is a known one and intact."""
        if self._known is None or self._known.get(name) != entry:
            return False
        try:
            return sha256(self._folder.read_bytes(*name.split("/"))) == entry.sha256
        except FileNotFoundError:
            return False
