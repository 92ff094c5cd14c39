"""JSON lines (`.jsonl`, `.json`, also `.gz`): one object per line, such as Amazon's reviews and metadata."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from distrec.config import nearest
from distrec.data.importers import text
from distrec.data.importers.formats import Form
from distrec.data.importers.records import LONGEST
from distrec.data.importers.rows import Rows, Span
from distrec.errors import InputError, shown

_ROWS = 100_000  # converted at a time
_LIST = pa.list_(pa.string())
_EXACT = 2**53  # integers up to here are floats too
_CONSTANTS = {"NaN": None, "Infinity": math.inf, "-Infinity": -math.inf}  # what Python reads beyond JSON's numbers


def read_json_lines(path: str, form: Form, columns: Sequence[str]) -> Rows:
    """The values at keys `columns` of each line's object; null where an object lacks the key.

    A column takes the type that fits all its values: Booleans, integers, floats or strings. If some are lists, all
    become lists of strings; nested lists are joined to one. Integers beyond 64 bits, and integers beyond 2**53 in a
    column with floats, become strings. A number that becomes a string is written as JSON writes it, but a whole float
    as an integer: `5.0` becomes `5`. All this depends on the values of the column alone, not on how many lines are
    converted at a time. `NaN` is null.

    Raises:
        InputError: a line is not a JSON object, a value is an object, an id is a Boolean, an infinite or a fractional
            number, or no line has one of the keys.
    """
    gathered: dict[str, list[_Part]] = {column: [] for column in columns}
    values: dict[str, list[Any]] = {column: [] for column in columns}
    seen: set[str] = set()
    lines = array("q")  # line of each row; 8 bytes each, where a list of numbers takes 36

    def convert() -> None:
        for column in columns:
            before = len(lines) - len(values[column])
            gathered[column].append(_part(values[column], column, form, before, lines))
            values[column].clear()

    for line, words in _lines(text.blocks(path, form), form):
        if not lines and words.lstrip().startswith(b"["):
            raise InputError(f"file '{form.name}' is one JSON array; write one object on each line, without the array.")
        record = _object(words, f"'{form.name}' row {len(lines)} (line {line})")
        seen.update(record)
        lines.append(line)
        for column in columns:
            values[column].append(record.get(column))
        if len(lines) % _ROWS == 0:
            convert()
    convert()
    for column in columns:
        if lines and column not in seen:
            raise InputError(
                f"file '{form.name}' has no key '{column}'; {shown(nearest(column, sorted(seen)), 400, quoted=False)}."
            )
    table = pa.table({column: _joined(gathered[column]) for column in columns})
    places: Sequence[int] = lines
    if lines and lines[-1] - lines[0] + 1 == len(lines):
        places = range(lines[0], lines[-1] + 1)
    spans = [Span(form.name, range(len(lines)), places)]
    return Rows(table, [(form.name, len(lines))], typed=True, spans=spans)


def _lines(blocks: Iterator[bytes], form: Form) -> Iterator[tuple[int, bytes]]:
    """Each line that is not blank, with its number from 1."""
    rest, number = b"", 0
    for block in blocks:
        *whole, rest = (rest + block).split(b"\n")
        if len(rest) > LONGEST:
            raise InputError(
                f"file '{form.name}' has a line longer than {LONGEST >> 20} MiB; give one object per line."
            )
        for line in whole:
            number += 1
            if line.strip():
                yield number, line
    if rest.strip():
        yield number + 1, rest


def _object(words: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(words, object_pairs_hook=_once, parse_constant=_CONSTANTS.get)
    except RecursionError:
        raise InputError(f"{where}: the object is nested too deeply; remove the row.") from None
    except (json.JSONDecodeError, _Twice) as error:
        raise InputError(
            f"{where}: not a JSON object ({text.first_line(error)}); give one object on each line."
        ) from None
    except ValueError:  # more digits than Python reads
        raise InputError(f"{where}: an integer of thousands of digits; write it as a string or shorten it.") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: holds {shown(record)}, not a JSON object; give one object on each line.")
    return record


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Twice(f"key '{twice}' appears twice")
    return record


class _Twice(Exception):
    """An object has a key twice."""


class _Part(NamedTuple):
    """Some values of a column, and the Python types among them, of which a column of one type has one."""

    kinds: set[type]
    values: pa.Array  # null, bool, int64, float64 or list of string; string also for values of several types


def _part(values: list[Any], column: str, form: Form, before: int, lines: Sequence[int]) -> _Part:
    """Values of one column; the first belongs to row `before`."""
    kinds = {type(value) for value in values} - {type(None)}
    if kinds == {int, float} and any(type(value) is int and abs(value) > _EXACT for value in values):
        kinds.add(str)
    if column in form.options.ids and not kinds.isdisjoint({bool, float}):
        _refuse_ids(values, column, form, before, lines)
    try:
        if dict in kinds:
            raise _Unfit("an object")
        if list in kinds:
            return _Part(kinds, pa.array([None if value is None else list(_flat(value)) for value in values], _LIST))
        if len(kinds) < 2:
            try:
                return _Part(kinds, pa.array(values, pa.int64() if kinds == {int} else None))
            except (OverflowError, pa.ArrowInvalid):  # integers beyond 64 bits
                kinds.add(str)
        return _Part(kinds, _words(values))
    except (_Unfit, UnicodeError) as error:
        _refuse(values, column, form, before, lines, error)


def _refuse_ids(values: list[Any], column: str, form: Form, before: int, lines: Sequence[int]) -> None:
    """Refuse Booleans and numbers that are not whole in a column of ids."""
    for row, value in enumerate(values, before):
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            what = "a fractional id" if isinstance(value, float) and math.isfinite(value) else "not an id"
            raise InputError(
                f"'{form.name}' row {row} (line {lines[row]}): {column} is {json.dumps(value)}, {what}; ids must be "
                "whole numbers or strings."
            )


class _Unfit(Exception):
    """A value that no column can hold."""


def _refuse(
    values: list[Any], column: str, form: Form, before: int, lines: Sequence[int], error: Exception
) -> NoReturn:
    for index, value in enumerate(values):
        try:
            for word in _flat(value):
                word.encode()
        except (_Unfit, UnicodeError):
            row = before + index
            what = str(error) if isinstance(error, _Unfit) else "half of a surrogate pair"
            raise InputError(
                f"'{form.name}' row {row} (line {lines[row]}): {column} holds {what}; name a key that has texts, "
                "numbers or lists of them."
            ) from None
    raise error


def _flat(value: Any) -> Iterator[str]:
    """The scalars of a value as strings, lists of any depth joined."""
    if isinstance(value, dict):
        raise _Unfit("an object")
    if isinstance(value, list):
        for part in value:
            yield from _flat(part)
    elif value is not None:
        yield _word(value)


def _word(value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT:
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value)


def _words(values: list[Any]) -> pa.Array:
    return pa.array([None if value is None else _word(value) for value in values], pa.string())


def _joined(parts: list[_Part]) -> pa.ChunkedArray:
    """Parts of a column, brought to one type."""
    kinds = set().union(*(part.kinds for part in parts))
    if list in kinds:
        return pa.chunked_array([_lists(part.values) for part in parts], _LIST)
    arrays = [part.values for part in parts]
    if kinds == {int, float}:
        try:
            return pa.chunked_array([pc.cast(values, pa.float64()) for values in arrays], pa.float64())
        except pa.ArrowInvalid:  # integers beyond 2**53 in a part that has no floats
            kinds.add(str)
    if len(kinds) == 1 and kinds != {str}:
        kind = next(values.type for values in arrays if not pa.types.is_null(values.type))
        return pa.chunked_array([values.cast(kind) for values in arrays], kind)
    return pa.chunked_array([_strings(values) for values in arrays], pa.string())


def _lists(values: pa.Array) -> pa.Array:
    if values.type == _LIST:
        return values
    return pa.array([None if word is None else [word] for word in _strings(values).to_pylist()], _LIST)


def _strings(values: pa.Array) -> pa.Array:
    """Values as strings, as `_words` writes them; Arrow would write large ones otherwise."""
    return _words(values.to_pylist()) if pa.types.is_floating(values.type) else values.cast(pa.string())
