"""Columns of ratings, times and split labels. A value that does not fit is named, with its row."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distrec.data.importers.rows import Rows
from distrec.data.manifest import SPLITS
from distrec.errors import InputError, shown

_DAY = r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
_CLOCK = r"[T ][0-9]{2}(:[0-9]{2}(:[0-9]{2}"
_TIMES: list[tuple[str, str, pa.DataType]] = [
    ("whole numbers", r"^-?[0-9]+$", pa.int64()),
    ("numbers", r"^[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?$", pa.float64()),
    ("dates", f"^{_DAY}$", pa.date32()),
    ("times", f"^{_DAY}({_CLOCK})?)?)?$", pa.timestamp("s")),
    ("times", f"^{_DAY}({_CLOCK}([.][0-9]+)?)?)?)?$", pa.timestamp("ns")),
    ("times with a zone", f"^{_DAY}{_CLOCK})?)?(Z|[-+][0-9:]+)$", pa.timestamp("s", "UTC")),
    ("times with a zone", f"^{_DAY}{_CLOCK}([.][0-9]+)?)?)?(Z|[-+][0-9:]+)$", pa.timestamp("ns", "UTC")),
]
"""What times written as text may be: in words, as a pattern, and the type to read them as."""

_UNITS = {10: "seconds", 13: "milliseconds", 16: "microseconds"}
"""Digits that present times have, counted from 1970, by unit."""


def numbers(rows: Rows, column: str) -> np.ndarray:
    """A column of finite numbers, `[rows]` float64; `true` and `false` count as 1 and 0.

    Raises:
        InputError: a value is missing or not a finite number.
    """
    values = plain(rows.table[column])
    refuse_empty(rows, column, values)
    if is_string(values.type):
        values = _trimmed(values)
        lower = pc.utf8_lower(values)
        if pc.all(pc.is_in(lower, value_set=pa.array(["true", "false"]))).as_py():
            values = lower.cast(pa.bool_())
    found = _cast(rows, column, values, pa.float64(), "a number").to_numpy()
    if not np.isfinite(found).all():
        row = int(np.flatnonzero(~np.isfinite(found))[0])
        raise InputError(f"{rows.at(row)}: {column} is {found[row]}; give a finite number or remove the row.")
    return found


def times(rows: Rows, column: str) -> np.ndarray:
    """A column of times as int64 `[rows]`: integers unchanged, dates and times as integers in the column's unit.

    Raises:
        InputError: a value is missing, is not a time, or is not of the kind of the others.
    """
    values = plain(rows.table[column])
    refuse_empty(rows, column, values)
    if is_string(values.type):
        values = _times_from_text(rows, column, _trimmed(values))
    kind = values.type
    if pa.types.is_time(kind) or pa.types.is_duration(kind) or pa.types.is_boolean(kind) or pa.types.is_nested(kind):
        raise InputError(
            f"file {rows.name}: column '{column}' holds {kind}; a time is an integer, a date, or a date with a time of "
            "day."
        )
    if pa.types.is_floating(values.type):
        found = values.cast(pa.float64()).to_numpy()
        broken = ~(found == np.floor(found)) | ~(np.abs(found) < 2.0**53)
        if broken.any():
            row = int(np.flatnonzero(broken)[0])
            raise InputError(f"{rows.at(row)}: {column} is {found[row]}; give whole seconds or milliseconds.")
        return found.astype(np.int64)
    if pa.types.is_date32(values.type):
        return values.cast(pa.int32()).to_numpy().astype(np.int64)
    return _cast(rows, column, values, pa.int64(), "a time as an integer or a date").to_numpy()


def _times_from_text(rows: Rows, column: str, values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Times as integers, floats, dates or timestamps, whichever fits all values."""
    try:
        found = values.cast(pa.int64())  # the usual case, quickly
        if not pc.any(pc.match_substring(values, "x", ignore_case=True)).as_py():  # Arrow reads 0x1f
            return found
    except pa.ArrowException:
        pass
    best, most, fit = 0, -1, values
    for index, (what, pattern, kind) in enumerate(_TIMES):
        fits = pc.match_substring_regex(values, pattern)
        count = int(pc.sum(fits).as_py() or 0)
        if count == len(values):
            return _cast(rows, column, values, kind, f"in the range that {what} can have")
        if count > most:
            best, most, fit = index, count, fits
    row = first_true(pc.invert(fit))
    value = shown(values[row], quoted=False)
    if not most:
        raise InputError(
            f"{rows.at(row)}: {column} is '{value}', not a time; give integers, or dates such as 2021-03-01 or "
            "2021-03-01 10:00:00."
        )
    example = shown(values[first_true(fit)], quoted=False)
    raise InputError(
        f"{rows.at(row)}: {column} is '{value}', but {most:,} of {len(values):,} values are {_TIMES[best][0]} such as "
        f"'{example}'; correct it or remove the row."
    )


def mixed_units(rows: Rows, column: str, found: np.ndarray) -> list[str]:
    """A note if some of the times `found` in a column of numbers look like seconds and others like milliseconds.

    Args:
        rows: The table.
        column: The column of times.
        found: What `times` returned for it.
    """
    if pa.types.is_temporal(plain(rows.table[column]).type):
        return []
    size, told = np.abs(found), []
    for digits, unit in _UNITS.items():
        some = found[(size >= 10 ** (digits - 1)) & (size < 10**digits)]
        if len(some):
            values = "value" if len(some) == 1 else "values"
            told.append(f"{len(some):,} {values} of {digits} digits, like {unit} ({some.min()} to {some.max()})")
    if len(told) < 2:
        return []
    return [f"{rows.name}: {column} holds {', and '.join(told)}; if units are mixed, write all times in one"]


def labels(rows: Rows, column: str) -> np.ndarray:
    """Split labels `train`, `valid`, `test` or 0, 1, 2 as int8 `[rows]`.

    Raises:
        InputError: a value is none of these.
    """
    values = plain(rows.table[column])
    known = pa.array([0, 1, 2])
    if is_string(values.type):
        known = pa.array([*SPLITS, *([] if rows.typed else ["0", "1", "2"])])
        if not rows.typed:
            values = pc.replace_substring_regex(_trimmed(values), r"^([012])\.0*$", r"\1")
    try:
        found = pc.index_in(values.cast(known.type), value_set=known)
    except pa.ArrowException:
        row = _first_failing(values, known.type) if pa.types.is_floating(values.type) else None
        if row is not None:
            raise InputError(_label(rows, column, row, values)) from None
        raise InputError(
            f"file {rows.name}: column '{column}' holds {values.type}; a split is train, valid or test, or 0, 1 or 2."
        ) from None
    if found.null_count:
        raise InputError(_label(rows, column, first_true(pc.is_null(found)), values))
    return (found.to_numpy() % 3).astype(np.int8)


def _label(rows: Rows, column: str, row: int, values: pa.ChunkedArray) -> str:
    value = shown(values[row], quoted=False) if values[row].is_valid else ""
    return f"{rows.at(row)}: {column} is {value or 'empty'}; a split is train, valid or test, or 0, 1 or 2."


def refuse_empty(rows: Rows, column: str, values: pa.ChunkedArray) -> None:
    """Refuse a column with a missing value.

    Raises:
        InputError: names the first row without a value.
    """
    if values.null_count:
        raise InputError(f"{rows.at(first_true(pc.is_null(values)))}: {column} is empty; fill it or remove the row.")


def _cast(rows: Rows, column: str, values: pa.ChunkedArray, kind: pa.DataType, what: str) -> pa.ChunkedArray:
    try:
        return values.cast(kind)
    except pa.ArrowException:
        row = _first_failing(values, kind)
        raise InputError(
            f"{rows.at(row)}: {column} is '{shown(values[row], quoted=False)}', not {what}; correct it."
        ) from None


def _first_failing(values: pa.ChunkedArray, kind: pa.DataType) -> int:
    """The first row whose value cannot be cast, found by halving."""
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            values[low:middle].cast(kind)
            low = middle
        except pa.ArrowException:
            high = middle
    return low


def _trimmed(values: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.utf8_trim_whitespace(values)


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column without dictionary encoding."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def is_string(kind: pa.DataType) -> bool:
    """Whether values are text."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def first_true(mask: pa.ChunkedArray) -> int:
    """The first row at which a mask is true; there must be one."""
    return int(np.flatnonzero(mask.to_numpy(zero_copy_only=False))[0])
