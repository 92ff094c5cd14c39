"""Records of delimited text: where each begins and ends, found over whole blocks and apart from the parser.

A value is quoted if it begins with `"`. It ends at the next `"` that is not doubled, and a delimiter, a line break or
the end of the file must follow. A `"` elsewhere in a value is text. Lines end with LF, CR LF or CR; empty ones do not
count as records.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from distrec.data.importers.formats import Form
from distrec.errors import InputError

LONGEST = 1 << 28
"""Most bytes of a single record."""

_LF, _CR, _QUOTE = 10, 13, 34
_NEAR = 1 << 16  # bytes of a faulty value that are looked at for escapes
STAND_IN = "\x1f"
"""Replaces a delimiter of several bytes, which the parser cannot take."""


@dataclass(frozen=True)
class Quoted:
    """Quoted values of a block, `[values]` int64 each: positions of the opening and of the closing quote."""

    opens: np.ndarray
    closes: np.ndarray  # the block's length for a value that has not ended

    def holds(self, positions: np.ndarray) -> np.ndarray:
        """Whether each of the ascending `positions` is inside a quoted value, `[positions]` bool."""
        if not len(self.opens):
            return np.zeros(len(positions), bool)
        value = np.searchsorted(self.opens, positions) - 1
        return (value >= 0) & (positions < self.closes[value])


@dataclass(frozen=True)
class Block:
    """Whole records of a file, in order; arrays are `[records]` int64."""

    data: bytes
    starts: np.ndarray  # first byte
    ends: np.ndarray  # after the last byte, without the line break
    values: np.ndarray  # number of values
    lines: np.ndarray  # line in the file in which the record begins, counted from 1
    breaks: np.ndarray  # line breaks inside its values
    inner: np.ndarray  # delimiters inside quoted values
    quoted: Quoted

    def __len__(self) -> int:
        return len(self.starts)

    def record(self, index: int) -> bytes:
        """The bytes of one record."""
        return self.data[self.starts[index] : self.ends[index]]


def blocks_of_records(text: Iterable[bytes], form: Form) -> Iterator[Block]:
    """Cut UTF-8 text into blocks of whole records. An empty file has none.

    Raises:
        InputError: a quoted value is not closed, or something else than a delimiter or line break follows it.
    """
    long = form.delimiter.encode() if len(form.delimiter.encode()) > 1 else None
    rest, line, before = b"", 1, 0
    for piece, last in _with_last(text):
        if long is not None and STAND_IN.encode() in piece:
            raise InputError(f"file '{form.name}' holds the control character 0x1F; remove it or convert the file.")
        data = rest + piece
        if long is not None:
            data = data.replace(long, STAND_IN.encode())
        block, used, lines = _scan(data, form, last, line, before)
        rest, line, before = data[used:], line + lines, before + len(block)
        if len(rest) > LONGEST:
            raise InputError(
                f"file '{form.name}' line {line}: a row longer than {LONGEST >> 20} MiB, perhaps because of a stray "
                f"quotation mark; correct it or {form.setting('quoting: none', 'remove it')}."
            )
        if len(block):
            yield block


def _with_last(text: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    pieces = iter(text)
    piece = next(pieces, b"")
    for following in pieces:
        yield piece, False
        piece = following
    yield piece, True


def _scan(data: bytes, form: Form, last: bool, line: int, before: int) -> tuple[Block, int, int]:
    """The whole records of `data`, the number of its bytes that they use, and of the lines in these."""
    here = np.frombuffer(without_escapes(data, form), np.uint8)
    delimiter = ord(form.delimiter if len(form.delimiter.encode()) == 1 else STAND_IN)
    ends = _line_ends(np.frombuffer(data, np.uint8), last)
    # CR LF is one line end in `ends`; in `marks` an empty record lies between the two, which does not count.
    marks = np.flatnonzero((here == _LF) | (here == _CR))
    quoted, fault = _quoted(here, delimiter, form, last)
    outside = marks if not len(quoted.opens) else marks[~quoted.holds(marks)]
    if not last and len(outside) and outside[-1] == len(here) - 1 and here[-1] == _CR:
        outside = outside[:-1]
    used = len(data) if last else int(outside[-1]) + 1 if len(outside) else 0
    starts, stops = np.concatenate([[0], outside + 1]), np.append(outside, len(data))
    there = stops > starts
    if fault is not None:
        _refuse(data, form, fault, starts[there], line + np.searchsorted(ends, starts[there]), before)
    there[-1] &= last
    starts, stops = starts[there], stops[there]
    separators = np.flatnonzero(here == delimiter)
    within = quoted.holds(separators)
    block = Block(
        data=data[:used],
        starts=starts,
        ends=stops,
        values=_count(separators[~within], starts, stops) + 1,
        lines=line + np.searchsorted(ends, starts),
        breaks=_count(ends, starts, stops),
        inner=_count(separators[within], starts, stops),
        quoted=quoted,
    )
    return block, used, int(np.searchsorted(ends, used))


def without_escapes(data: bytes, form: Form) -> bytes:
    """`data` with characters after a backslash replaced, if the form has such; the positions of all others stay."""
    if form.quoting == "backslash":
        for escaped in (b"\\\\", b'\\"', b"\\\n", b"\\\r", b"\\" + form.delimiter.encode()):
            data = data.replace(escaped, b"xx")
    return data


def _line_ends(here: np.ndarray, last: bool) -> np.ndarray:
    """Where lines end, with CR LF counted once, at its LF. A CR at the end of a block may belong to a LF after it."""
    returns = here == _CR
    marks = np.flatnonzero((here == _LF) | returns)
    if not returns.any():
        return marks
    followed = np.append(here[1:] == _LF, not last)
    return marks[~(returns[marks] & followed[marks])]


def _count(positions: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """How many of the ascending `positions` each record holds."""
    return np.searchsorted(positions, stops) - np.searchsorted(positions, starts)


def _quoted(here: np.ndarray, delimiter: int, form: Form, last: bool) -> tuple[Quoted, tuple[int, str] | None]:
    """The quoted values of a block, and the position and kind of the first fault."""
    quotes = np.flatnonzero(here == _QUOTE) if form.quoting != "none" else np.empty(0, np.int64)
    if not len(quotes):
        return Quoted(quotes, quotes), None
    apart = np.zeros(256, bool)
    apart[[_LF, _CR, delimiter]] = True
    begins = np.concatenate([[True], apart[here]])[quotes]  # what stands before each quote separates values
    stops = np.append(apart[here], True)[quotes + 1]
    doubled = np.append(quotes[1:] == quotes[:-1] + 1, False)  # the next byte is a quote
    regular = begins.copy()
    regular[1:] |= doubled[:-1]
    regular[1::2] = (stops | doubled)[1::2]
    fault = None
    if regular.all():  # quotes open and close in turn, doubled ones too
        opens, closes = quotes[::2], quotes[1::2]
        if len(opens) > len(closes):
            closes = np.append(closes, len(here))
        whole = np.append(True, opens[1:] != closes[:-1] + 1)  # the others continue a value after a doubled quote
        opens, closes = opens[whole], closes[np.append(whole[1:], True)]
    else:
        opens, closes, fault = _walk(quotes, begins, stops, doubled, len(here))
    if fault is None and last and len(closes) and closes[-1] == len(here):
        fault = (int(opens[-1]), "is missing")
    return Quoted(opens, closes), fault


def _walk(
    quotes: np.ndarray, begins: np.ndarray, stops: np.ndarray, doubled: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, tuple[int, str] | None]:
    """As `_quoted`, quote by quote, for a block in which some quotes are text."""
    at, begin, stop, double = quotes.tolist(), begins.tolist(), stops.tolist(), doubled.tolist()
    opens: list[int] = []
    closes: list[int] = []
    fault: tuple[int, str] | None = None
    index, count = 0, len(at)
    while index < count and fault is None:
        if not begin[index]:
            index += 1
            continue
        opens.append(at[index])
        index += 1
        while index < count and double[index]:
            index += 2
        if index < count and not stop[index]:
            fault = (opens[-1], "is followed by other text")
        closes.append(at[index] if index < count else size)
        index += 1
    return np.array(opens, np.int64), np.array(closes, np.int64), fault


def _refuse(
    data: bytes, form: Form, fault: tuple[int, str], starts: np.ndarray, lines: np.ndarray, before: int
) -> None:
    position, kind = fault
    index = int(np.searchsorted(starts, position, side="right")) - 1
    row = before + index - (form.options.heading is None)
    where = "heading" if row < 0 else f"row {row} (line {lines[index]})"
    remedy = f"double each quotation mark inside a quoted value, or {form.setting('quoting: none', 'remove it')}"
    rest = data[position : position + _NEAR].splitlines()[0]
    if form.quoting == "standard" and b'\\"' in rest:
        other = form.setting("quoting: backslash", "double it")
        remedy = f'{other} if \\" is a quotation mark inside a value, or {form.setting("quoting: none", "remove it")}'
    raise InputError(
        f"'{form.name}' {where}: a value begins with a quotation mark whose closing mark {kind}; {remedy} if it is "
        "text."
    )
