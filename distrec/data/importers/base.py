"""What every importer returns, and the checks of ids, numbers and split labels that importers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distrec.data.dataset import SPLITS
from distrec.data.importers.source import Rows
from distrec.errors import InputError

ImageReader = Callable[[np.ndarray], list[bytes | None]]
"""Maps catalogue rows to the bytes of their image files; None for an item without an image."""


@dataclass(frozen=True)
class RawFeature:
    """Precomputed vectors in catalogue order; `values` is usually memory-mapped."""

    values: np.ndarray  # [catalogue, width] float16, float32 or float64; all finite, zeros where missing
    missing: np.ndarray  # [catalogue] bool
    source: str


@dataclass(frozen=True)
class RawInteractions:
    """All rows of the source, in its order. Users and items are codes: indices into the ascending original ids."""

    user_ids: pa.Array  # int64 or string, ascending, distinct
    item_ids: pa.Array
    user: np.ndarray  # [rows] int64 codes into user_ids
    item: np.ndarray
    rating: np.ndarray | None  # float64
    timestamp: np.ndarray | None  # int64
    label: np.ndarray | None  # int8: 0 train, 1 valid, 2 test

    def __len__(self) -> int:
        return len(self.user)


@dataclass(frozen=True)
class RawDataset:
    """A source as an importer returns it, with original ids and without any filtering.

    The catalogue is the importer's own order of the items: the rows of the items table, or the ascending ids.
    """

    interactions: RawInteractions
    catalogue_row: np.ndarray  # [items] catalogue row of each element of `interactions.item_ids`
    titles: pa.Array | None = None  # [catalogue] string, nullable
    texts: pa.Array | None = None  # [catalogue] string, nullable
    images: ImageReader | None = None
    features: dict[str, RawFeature] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what reading left out or doubted; prepare prints each


@dataclass(frozen=True)
class Columns:
    """Names of the columns of an interactions table; None if it has no such column."""

    user: str
    item: str
    rating: str | None
    timestamp: str | None
    split: str | None

    def names(self) -> list[str]:
        """The columns to read."""
        return [name for name in (self.user, self.item, self.rating, self.timestamp, self.split) if name is not None]


def interactions(
    rows: Rows, columns: Columns, catalogue: pa.Array | None, catalogue_name: str
) -> tuple[RawInteractions, np.ndarray]:
    """The interactions in `rows`, and the catalogue row of each item id.

    Raises:
        InputError: an id, rating, timestamp or label is invalid, or an item is not in the `catalogue`.
    """
    if not rows.table.num_rows:
        raise InputError(f"file {rows.name} has no interactions; give a table with rows.")
    users, user = _codes(read_ids(rows, columns.user))
    items = read_ids(rows, columns.item)
    if catalogue is None:
        item_ids, item = _codes(items)
        catalogue_row = np.arange(len(item_ids))
    else:
        catalogue, items = same_type(catalogue, items)
        found = pc.index_in(items, value_set=catalogue)
        if found.null_count:
            row = _first(pc.is_null(found))
            raise InputError(
                f"{rows.at(row)}: {columns.item} {items[row]} is not among {catalogue_name}; add it there or remove "
                "the row."
            )
        catalogue_row = pc.sort_indices(catalogue).to_numpy().astype(np.int64)
        item_ids, item = catalogue.take(pa.array(catalogue_row)), _inverse(catalogue_row)[found.to_numpy()]
    raw = RawInteractions(
        user_ids=users,
        item_ids=item_ids,
        user=user,
        item=item,
        rating=None if columns.rating is None else _numbers(rows, columns.rating),
        timestamp=None if columns.timestamp is None else _times(rows, columns.timestamp),
        label=None if columns.split is None else _labels(rows, columns.split),
    )
    return raw, catalogue_row


def read_ids(rows: Rows, column: str) -> pa.ChunkedArray:
    """A column of original ids, as non-negative int64 or as string.

    Text files do not declare the type. A column of plain integers becomes int64, unless that would lose a leading zero
    or sign. So does a column of whole decimal numbers. Any other column is string.

    Raises:
        InputError: an id is empty, negative, fractional or too large.
    """
    ids = _plain(rows.table[column])
    if ids.null_count:
        raise InputError(f"{rows.at(_first(pc.is_null(ids)))}: {column} is empty; fill it or remove the row.")
    if _is_string(ids.type):
        ids = ids.cast(pa.string())
        ids = ids if rows.typed else _ids_from_text(rows, column, ids)
    elif pa.types.is_floating(ids.type):
        ids = _whole(rows, column, ids)
    elif pa.types.is_integer(ids.type):
        try:
            ids = ids.cast(pa.int64())
        except pa.ArrowInvalid:
            raise _overflow(rows, column, ids, pc.greater(ids, 2**63 - 1)) from None
    else:
        raise InputError(f"file {rows.name}: column '{column}' holds {ids.type}; ids must be integers or strings.")
    if pa.types.is_int64(ids.type) and len(ids) and pc.min(ids).as_py() < 0:
        row = _first(pc.less(ids, 0))
        raise InputError(
            f"{rows.at(row)}: {column} is {ids[row]}, a negative id; number from 0 or give ids as strings."
        )
    return ids


def _ids_from_text(rows: Rows, column: str, ids: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        numbers = ids.cast(pa.int64())
    except pa.ArrowInvalid:
        if pc.all(pc.match_substring_regex(ids, r"^-?[0-9]+(\.[0-9]*)?$")).as_py():
            return _whole(rows, column, ids.cast(pa.float64()))
        return ids
    return numbers if numbers.cast(pa.string()).equals(ids) else ids


def _whole(rows: Rows, column: str, ids: pa.ChunkedArray) -> pa.ChunkedArray:
    values = ids.cast(pa.float64()).to_numpy()
    broken = values != np.floor(values)
    if broken.any():
        row = int(np.flatnonzero(broken)[0])
        raise InputError(f"{rows.at(row)}: {column} is {values[row]}, a fractional id; ids must be whole numbers.")
    large = ~(np.abs(values) < 2.0**53)
    if large.any():
        raise _overflow(rows, column, ids, pa.array(large))
    return pa.chunked_array([values.astype(np.int64)])


def _overflow(rows: Rows, column: str, ids: pa.ChunkedArray, where: pa.ChunkedArray) -> InputError:
    row = _first(where)
    return InputError(f"{rows.at(row)}: {column} {ids[row]} overflows a 64-bit integer; give ids as strings.")


def _numbers(rows: Rows, column: str) -> np.ndarray:
    values = _cast(rows, column, pa.float64(), "a number")
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise InputError(f"{rows.at(row)}: {column} is {values[row]}; give a finite number or remove the row.")
    return values


def _times(rows: Rows, column: str) -> np.ndarray:
    """A column of times as int64 `[rows]`: integers unchanged, dates and times as integers in the column's unit."""
    kind = rows.table[column].type
    if pa.types.is_floating(kind):
        values = _numbers(rows, column)
        broken = (values != np.floor(values)) | (np.abs(values) >= 2.0**53)
        if broken.any():
            row = int(np.flatnonzero(broken)[0])
            raise InputError(f"{rows.at(row)}: {column} is {values[row]}; give whole seconds or milliseconds.")
        return values.astype(np.int64)
    if pa.types.is_date32(kind):
        return _cast(rows, column, pa.int32(), "a time").astype(np.int64)
    return _cast(rows, column, pa.int64(), "a time as an integer or a date")


def _labels(rows: Rows, column: str) -> np.ndarray:
    """Split labels `train`, `valid`, `test` or 0, 1, 2 as int8."""
    values = _plain(rows.table[column])
    known = pa.array(SPLITS) if _is_string(values.type) else pa.array([0, 1, 2])
    if _is_string(values.type) and not rows.typed:
        known = pa.array([*SPLITS, "0", "1", "2"])
    try:
        found = pc.index_in(values.cast(known.type), value_set=known)
    except pa.ArrowException:
        raise InputError(
            f"file {rows.name}: column '{column}' holds {values.type}; a split is train, valid or test, or 0, 1 or 2."
        ) from None
    if found.null_count:
        row = _first(pc.is_null(found))
        raise InputError(f"{rows.at(row)}: {column} is {values[row]}; a split is train, valid or test, or 0, 1 or 2.")
    return (found.to_numpy() % 3).astype(np.int8)


def _cast(rows: Rows, column: str, kind: pa.DataType, what: str) -> np.ndarray:
    values = _plain(rows.table[column])
    if values.null_count:
        raise InputError(f"{rows.at(_first(pc.is_null(values)))}: {column} is empty; fill it or remove the row.")
    try:
        return values.cast(kind).to_numpy()
    except pa.ArrowException:
        row = next((i for i, value in enumerate(values) if not _casts(value, kind)), 0)
        raise InputError(f"{rows.at(row)}: {column} is '{values[row]}', not {what}; correct it.") from None


def _casts(value: pa.Scalar, kind: pa.DataType) -> bool:
    try:
        value.cast(kind)
    except pa.ArrowException:
        return False
    return True


def _codes(ids: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """The distinct ids in ascending order, and each row's index into them."""
    encoded = ids.dictionary_encode().unify_dictionaries()
    seen = encoded.chunk(0).dictionary
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks])
    order = pc.sort_indices(seen).to_numpy().astype(np.int64)
    return seen.take(pa.array(order)), _inverse(order)[codes]


def _inverse(permutation: np.ndarray) -> np.ndarray:
    inverse = np.empty(len(permutation), np.int64)
    inverse[permutation] = np.arange(len(permutation))
    return inverse


def same_type(catalogue: pa.Array, ids: pa.ChunkedArray) -> tuple[pa.Array, pa.ChunkedArray]:
    """Both as they are if their types agree, otherwise both as string."""
    if catalogue.type != ids.type:
        return catalogue.cast(pa.string()), ids.cast(pa.string())
    return catalogue, ids


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _first(mask: pa.ChunkedArray) -> int:
    return int(np.flatnonzero(mask.to_numpy(zero_copy_only=False))[0])
