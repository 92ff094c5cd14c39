"""Delimited text (CSV, TSV, RecBole's atomic files) as a table of strings, every row accounted for."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from distrec.data.importers import text
from distrec.data.importers.formats import Form, actual, closest, plain_name, repeated
from distrec.data.importers.records import STAND_IN, Block, blocks_of_records, without_escapes
from distrec.data.importers.rows import Rows, Span
from distrec.errors import InputError, first_few, shown

_SHOWN = 3  # examples of dropped rows


def column_names(path: str, form: Form) -> list[str]:
    """The names of the columns: those of the config, or the first line; a RecBole type after a colon is cut off.

    Raises:
        InputError: the file is empty or not readable as text, or two columns have one name.
    """
    given = _given(form)
    if given is not None:
        return given
    first = next(_blocks(path, form, 1 << 16), None)
    if first is None:
        raise InputError(f"file '{form.name}' is empty; give a line of column names, and rows.")
    return _names(first, form)


def _given(form: Form) -> list[str] | None:
    """The names of the columns that the config gives."""
    given = form.options.heading
    return [plain_name(name) for name in given] if given and form.atomic else given


def _first(block: Block, form: Form) -> list[str]:
    """The values of the first record, as names of columns."""
    cells = _parsed(block.record(0), int(block.values[0]), form, None)
    names = [column[0].as_py() or "" for column in cells.columns]
    return [plain_name(name) for name in names] if form.atomic else names


def _names(block: Block, form: Form) -> list[str]:
    names = _first(block, form)
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
        self.names = _given(form)
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
            self.at = self._places()
            self._refuse_second_heading(block)
        here = np.arange(first, len(block))
        rows = self.count + here - first
        self.count += len(here)
        self._look_at_breaks(block, here, rows)
        good = block.values[here] == len(self.names)
        if not good.all():
            self._bad(block, here[~good], rows[~good])
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
            self.quoted += sum(pc.sum(enclosed(column)).as_py() or 0 for column in part.columns)
        self.parts.append(part.rename_columns(list(self.columns)))
        self.spans.append(Span(self.form.name, _compact(rows), _compact(block.lines[here])))

    def _bad(self, block: Block, bad: np.ndarray, rows: np.ndarray) -> None:
        """Refuse rows with too few or too many values, or count them."""
        assert self.names is not None
        width, form = len(self.names), self.form
        if form.options.bad_rows == "refuse":
            remedy = f"correct the row, or set '{form.key}.bad_rows: drop'" if form.key else "correct or remove the row"
            raise InputError(
                f"'{form.name}' row {rows[0]} (line {block.lines[bad[0]]}): {block.values[bad[0]]} values for {width} "
                f"columns; {remedy}."
            )
        self.dropped += len(bad)
        for index, row in zip(bad[:_SHOWN].tolist(), rows.tolist()):
            if len(self.bad) < _SHOWN:
                self.bad.append(f"row {row} (line {block.lines[index]}) with {block.values[index]} values")

    def _look_at_breaks(self, block: Block, here: np.ndarray, rows: np.ndarray) -> None:
        """Count the lines of multi-line rows; refuse those that a stray quotation mark seems to join."""
        assert self.names is not None
        breaks, width, form = block.breaks[here], len(self.names), self.form
        self.lines += len(here) + int(breaks.sum())
        if not breaks.any():
            return
        self.multiline += int((breaks > 0).sum())
        most = int(breaks.argmax())
        self.longest = max(self.longest, (int(breaks[most]) + 1, int(rows[most])), key=lambda pair: pair[0])
        sure = form.options.quoting == "standard" or width == 1
        suspects = (breaks > 0) & ((block.values[here] != width) | ((block.inner[here] > 0) & (not sure)))
        text = form.setting("quoting: none", "remove it")
        for index, row in zip(here[suspects].tolist(), rows[suspects].tolist()):
            where, more = f"'{form.name}' row {row} (line {block.lines[index]})", block.breaks[index]
            if block.values[index] != width:
                raise InputError(
                    f"{where}: {block.values[index]} values for {width} columns, in {more + 1} lines that a quotation "
                    f"mark joins; double each quotation mark inside a quoted value, or {text} if it is text."
                )
            if _joins_rows(block, index, width, form):
                real = f"set '{form.key}.quoting: standard'" if form.key else "write it in one line"
                if form.quoting == "backslash":
                    real = "write a backslash before each of its line breaks"
                raise InputError(
                    f"{where}: a quoted value contains what looks like {more} more row{'s' * int(more > 1)}; double "
                    f"each quotation mark inside it, {text} if it is text, or {real} if the value really has several "
                    "lines."
                )

    def _refuse_second_heading(self, block: Block) -> None:
        """Refuse a first line that names columns although the config does so too."""
        given = self.form.options.heading
        if given is None:
            return
        cells = [cell.strip().casefold() for cell in _first(block, self.form)]
        known = {name.strip().casefold() for name in (*given, *(self.names or []), *self.columns)}
        if any(cells) and known.issuperset(filter(None, cells)):
            raise InputError(
                f"key '{self.form.key}.heading' names the columns, but so does the first line of '{self.form.name}' "
                f"({shown(', '.join(cells))}); remove the key or that line."
            )

    def _places(self) -> list[int]:
        """The place of each column.

        Raises:
            InputError: the file lacks one; names the nearest one, or the delimiter that the file seems to have.
        """
        names, form = self.names or [], self.form
        found = [actual(column, names) for column in self.columns]
        for column, name in zip(self.columns, found):
            if name is not None:
                continue
            if len(names) == 1 and form.key:
                other = next((mark for mark in (",", ";", "\t", "|", "::") if mark in names[0]), form.delimiter)
                if other != form.delimiter:
                    raise InputError(
                        f"file '{form.name}' has no column '{column}' but a single one, {shown(names[0])}; set "
                        f"'{form.key}.delimiter' to {other!r} if that separates its values."
                    )
            raise InputError(
                f"file '{form.name}' has no column '{column}'; {shown(closest(column, names), 400, quoted=False)}."
            )
        return [names.index(name) for name in found if name is not None]

    def rows(self) -> Rows:
        """All rows of the blocks added."""
        name, notes = self.form.name, []
        if self.names is None:
            raise InputError(f"file '{name}' is empty; give a line of column names, and rows.")
        self._places()
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


def enclosed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Which values begin and end with a quotation mark; null where the value is."""
    both = pc.and_(pc.starts_with(column, '"'), pc.ends_with(column, '"'))
    return pc.and_(both, pc.greater(pc.binary_length(column), 1))


def _compact(numbers: np.ndarray) -> Sequence[int]:
    """Ascending numbers, as a range if they have no gap, otherwise in 8 bytes each."""
    first, end = int(numbers[0]), int(numbers[-1]) + 1
    return range(first, end) if end - first == len(numbers) else array("q", numbers.astype(np.int64).tobytes())


def _joins_rows(block: Block, index: int, width: int, form: Form) -> bool:
    """Whether a quoted value of a record has the shape of rows that a stray quotation mark joins.

    Of its complete inner lines, at least half have as many values as the table has columns. Without such a line, the
    two lines are the beginning of one row and the end of another: the second has as many delimiters as there are
    columns before the value; for the first column, the first line has as many as there are columns after it.
    """
    record, start = without_escapes(block.record(index), form), int(block.starts[index])
    mine = slice(*np.searchsorted(block.quoted.opens, [start, int(block.ends[index])]).tolist())
    delimiter, place, before = form.delimiter.encode(), 0, 0
    for opened, closed in zip(block.quoted.opens[mine].tolist(), block.quoted.closes[mine].tolist()):
        place += record[before : opened - start].count(delimiter)  # outside quoted values
        before = closed - start
        first, *more = re.split(rb"\r\n|\r|\n", record[opened - start + 1 : before])
        inner = [line.count(delimiter) == width - 1 for line in more[:-1] if line]
        if inner and 2 * sum(inner) >= len(inner):
            return True
        ends = place > 0 or first.count(delimiter) == width - 1
        if more and not inner and ends and more[-1].count(delimiter) == place:
            return True
    return False
