"""Delimited text (CSV, TSV, RecBole's atomic files) as a table of strings, every row accounted for."""

from __future__ import annotations

import csv
import re
from array import array
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from distrec.config import nearest
from distrec.data.importers import text
from distrec.data.importers.formats import Form, repeated
from distrec.data.importers.records import STAND_IN, Block, blocks_of_records
from distrec.data.importers.rows import Rows, Span
from distrec.errors import InputError, first_few, shown

_TYPED = re.compile(r":(token|token_seq|float|float_seq)$")
_NUMBER = re.compile(r"\s*[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?\s*")
_SHOWN = 3  # examples of dropped rows


def column_names(path: str, form: Form) -> list[str]:
    """The names of the columns: those of the config, or the first line; a RecBole type after a colon is cut off.

    Raises:
        InputError: the file is empty or not readable as text, or two columns have one name.
    """
    if form.options.heading is not None:
        return form.options.heading
    first = next(_blocks(path, form, 1 << 16), None)
    if first is None:
        raise InputError(f"file '{form.name}' is empty; give a line of column names, and rows.")
    return _names(first, form)


def _names(block: Block, form: Form) -> list[str]:
    cells = _parsed(block.record(0), int(block.values[0]), form, None)
    names = [column[0].as_py() or "" for column in cells.columns]
    if form.atomic:
        names = [_TYPED.sub("", name) for name in names]
    twice = repeated(names)
    if twice is not None:
        raise InputError(f"file '{form.name}' has two columns named '{twice}'; give each a name of its own.")
    return names


def read_delimited(path: str, form: Form, columns: Sequence[str]) -> Rows:
    """The `columns` of a file, all of them strings; an empty value is null.

    Raises:
        InputError: the file is not readable as text, a column is missing or occurs twice, a row has too few or too many
            values and is not to be dropped, or a quoted value is malformed.
    """
    reader = _Reader(form, columns)
    for block in _blocks(path, form):
        reader.add(block)
    return reader.rows()


def _blocks(path: str, form: Form, size: int | None = None) -> Iterator[Block]:
    return blocks_of_records(text.blocks(path, form, size), form)


class _Reader:
    """Gathers the rows of a file, block by block."""

    def __init__(self, form: Form, columns: Sequence[str]):
        self.form, self.columns = form, columns
        self.names: list[str] | None = form.options.heading
        self.at: list[int] | None = None  # place of each column
        self.parts: list[pa.Table] = []
        self.spans: list[Span] = []
        self.count = 0  # rows seen, dropped ones too
        self.bad: list[str] = []  # examples
        self.dropped = self.lines = self.multiline = self.quoted = 0
        self.longest = (0, 0)  # lines of a row, row

    def add(self, block: Block) -> None:
        first = 0
        if self.names is None:
            self.names, first = _names(block, self.form), 1
        if self.at is None:
            self._require()
            self.at = [self.names.index(column) for column in self.columns]
        here = np.arange(first, len(block))
        rows = self.count + here - first
        self.count += len(here)
        good = block.values[here] == len(self.names)
        if not good.all():
            self._bad(block, here[~good], rows[~good])
        self._look_at_breaks(block, here, rows)
        here, rows = here[good], rows[good]
        if not len(here):
            return
        whole = first == 0 and bool(good.all())
        data = block.data if whole else b"\n".join(map(block.record, here.tolist()))
        if not whole and first == 1 and good.all():
            data = block.data[block.starts[1] :]
        part = _parsed(data, len(self.names), self.form, self.at, int((block.ends - block.starts).max()))
        if part.num_rows != len(here):
            raise InputError(
                f"file '{self.form.name}' has {len(here)} rows from line {block.lines[here[0]]} on, but "
                f"{part.num_rows} were read; correct quotation marks and line breaks in these rows."
            )
        if self.form.quoting == "none" and self.form.options.quoting is None:
            self.quoted += sum(_enclosed(column) for column in part.columns)
        self.parts.append(part.rename_columns(list(self.columns)))
        self.spans.append(Span(self.form.name, _compact(rows), _compact(block.lines[here])))

    def _bad(self, block: Block, bad: np.ndarray, rows: np.ndarray) -> None:
        """Refuse rows with too few or too many values, or count them."""
        assert self.names is not None
        width, form = len(self.names), self.form
        if form.options.bad_rows == "refuse":
            drop = form.setting("bad_rows: drop", "remove the row")
            raise InputError(
                f"'{form.name}' row {rows[0]} (line {block.lines[bad[0]]}): {block.values[bad[0]]} values for {width} "
                f"columns; correct the row, or {drop}."
            )
        self.dropped += len(bad)
        for index, row in zip(bad[:_SHOWN].tolist(), rows.tolist()):
            if len(self.bad) < _SHOWN:
                self.bad.append(f"row {row} (line {block.lines[index]}) with {block.values[index]} values")

    def _look_at_breaks(self, block: Block, here: np.ndarray, rows: np.ndarray) -> None:
        """Count the lines of multi-line rows; refuse a quoted value that looks like several rows."""
        assert self.names is not None
        breaks = block.breaks[here]
        self.lines += len(here) + int(breaks.sum())
        if not breaks.any():
            return
        self.multiline += int((breaks > 0).sum())
        most = int(breaks.argmax())
        self.longest = max(self.longest, (int(breaks[most]) + 1, int(rows[most])), key=lambda pair: pair[0])
        suspects = (breaks > 0) & (block.inner[here] == breaks * (len(self.names) - 1))
        for index, row in zip(here[suspects].tolist(), rows[suspects].tolist()):
            if _swallows_rows(block, index, len(self.names), self.form):
                raise InputError(
                    f"'{self.form.name}' row {row} (line {block.lines[index]}): a quoted value contains what looks "
                    f"like {block.breaks[index]} more rows, so its quotation marks are probably text; double them "
                    f"inside a quoted value, or {self.form.setting('quoting: none', 'remove them')}."
                )

    def _require(self) -> None:
        """Refuse a file that lacks a column, and name the nearest one, or the delimiter that the file seems to have."""
        names, form = self.names or [], self.form
        for column in self.columns:
            if column in names:
                continue
            if len(names) == 1 and form.key:
                other = next((mark for mark in (",", ";", "\t", "|", "::") if mark in names[0]), form.delimiter)
                if other != form.delimiter:
                    raise InputError(
                        f"file '{form.name}' has no column '{column}' but a single one, {shown(names[0])}; set "
                        f"'{form.key}.delimiter' to {other!r} if that separates its values."
                    )
            raise InputError(
                f"file '{form.name}' has no column '{column}'; {shown(nearest(column, names), 400, quoted=False)}."
            )

    def rows(self) -> Rows:
        """All rows of the blocks added."""
        name, notes = self.form.name, []
        if self.names is None:
            raise InputError(f"file '{name}' is empty; give a line of column names, and rows.")
        self._require()
        if self.dropped:
            notes.append(
                f"'{name}': dropped {self.dropped:,} of {self.count:,} rows, which do not have {len(self.names)} "
                f"values: {first_few(self.bad, self.dropped, _SHOWN)}"
            )
        if self.multiline:
            lines, row = self.longest
            notes.append(
                f"'{name}': {self.lines:,} lines make {self.count:,} rows, because quoted values in "
                f"{self.multiline:,} of them contain line breaks (longest: {lines:,} lines, row {row})"
            )
        if self.quoted:
            remedy = self.form.setting("quoting: standard", "write it without quotation marks")
            notes.append(
                f"'{name}': {self.quoted:,} values begin and end with a quotation mark, which stays part of them; if "
                f"it only encloses values, {remedy}"
            )
        empty = pa.table({column: pa.array([], pa.string()) for column in self.columns})
        table = pa.concat_tables(self.parts) if self.parts else empty
        return Rows(table, [(name, table.num_rows)], typed=False, spans=self.spans, notes=notes)


def _parsed(data: bytes, width: int, form: Form, at: list[int] | None, longest: int | None = None) -> pa.Table:
    """Columns `at` (all if None) of records of at most `longest` bytes, as strings; the columns are named by place."""
    names = [str(place) for place in range(width)]
    chosen = names if at is None else [names[place] for place in at]
    try:
        return pa.csv.read_csv(
            pa.BufferReader(data),
            read_options=pa.csv.ReadOptions(column_names=names, block_size=max(1 << 20, 2 * (longest or len(data)))),
            parse_options=pa.csv.ParseOptions(
                delimiter=form.delimiter if len(form.delimiter.encode()) == 1 else STAND_IN,
                quote_char=False if form.quoting == "none" else '"',
                escape_char="\\" if form.quoting == "backslash" else False,
                newlines_in_values=form.quoting != "none",
            ),
            convert_options=pa.csv.ConvertOptions(
                include_columns=chosen,
                column_types=dict.fromkeys(chosen, pa.string()),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    except pa.ArrowException as error:
        raise text.unreadable(form.name, "delimited text", error) from None


def _enclosed(column: pa.ChunkedArray) -> int:
    """How many values begin and end with a quotation mark."""
    both = pc.and_(pc.starts_with(column, '"'), pc.ends_with(column, '"'))
    return int(pc.sum(pc.and_(both, pc.greater(pc.binary_length(column), 1))).as_py() or 0)


def _compact(numbers: np.ndarray) -> Sequence[int]:
    """Ascending numbers, as a range if they have no gap, otherwise in 8 bytes each."""
    first, end = int(numbers[0]), int(numbers[-1]) + 1
    return range(first, end) if end - first == len(numbers) else array("q", numbers.astype(np.int64).tobytes())


def _swallows_rows(block: Block, index: int, width: int, form: Form) -> bool:
    """Whether the lines inside the quoted value of a record are rows: as many values, numbers where it has numbers."""
    start, end = int(block.starts[index]), int(block.ends[index])
    mine = slice(*np.searchsorted(block.quoted.opens, [start, end]).tolist())
    pairs = zip(block.quoted.opens[mine].tolist(), block.quoted.closes[mine].tolist())
    inside = [(a, b) for a, b in pairs if re.search(rb"[\r\n]", block.data[a:b])]
    if len(inside) != 1:
        return False
    opened, closed = inside[0]
    left = _split(block.data[start:opened] + b'""', form)
    right = _split(b'""' + block.data[closed + 1 : end], form)
    if len(left) + len(right) != width + 1:
        return False
    values = [*left[:-1], "", *right[1:]]
    place = len(left) - 1
    pieces = [piece.split(form.delimiter) for piece in re.split("\r\n|\r|\n", block.data[opened + 1 : closed].decode())]
    first = [""] * (place + 1) + pieces[0][1:]
    last = pieces[-1][:-1] + [""] * (width - place)
    numbers = [at for at, value in enumerate(values) if at != place and _NUMBER.fullmatch(value)]
    for number, line in enumerate([first, *pieces[1:-1], last]):
        ours = slice(place + 1, width) if not number else slice(0, place) if number == len(pieces) - 1 else slice(width)
        expected = set(numbers) & set(range(width)[ours])
        if len(line) != width or not all(_NUMBER.fullmatch(line[at]) for at in expected):
            return False
    return bool(numbers)


def _split(record: bytes, form: Form) -> list[str]:
    escape = "\\" if form.quoting == "backslash" else None
    try:
        return next(csv.reader([record.decode()], delimiter=form.delimiter, escapechar=escape), [""])
    except csv.Error:  # values longer than the module's limit
        return []
