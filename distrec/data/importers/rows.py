"""Rows of a table and where each comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa


@dataclass(frozen=True)
class Span:
    """Consecutive rows of a table that come from one file, in order."""

    file: str
    rows: Sequence[int]  # number in the file, from 0 below the heading
    lines: Sequence[int] | None = None  # line of the file in which each row begins, from 1; None if it has no lines


@dataclass(frozen=True)
class Rows:
    """A table read from one or more files, with the origin of each row."""

    table: pa.Table
    files: list[tuple[str, int]]  # name, rows
    typed: (
        bool  # Parquet and JSON declare the types of values; delimited text does not, and all its columns are strings
    )
    spans: list[Span] = field(default_factory=list)  # where rows are; without any, they are numbered as in `files`
    notes: list[str] = field(default_factory=list)  # what was dropped or doubted while reading

    def at(self, row: int) -> str:
        """Name row `row` of the table by its file, its number in that file, from 0, and its line if it has one."""
        for span in self.spans or [Span(name, range(count)) for name, count in self.files]:
            if row < len(span.rows):
                line = "" if span.lines is None else f" (line {span.lines[row]})"
                return f"'{span.file}' row {span.rows[row]}{line}"
            row -= len(span.rows)
        raise IndexError(row)

    @property
    def name(self) -> str:
        """The file's name, or the first name and how many more there are."""
        return f"'{self.files[0][0]}'" + (f" and {len(self.files) - 1} more" if len(self.files) > 1 else "")
