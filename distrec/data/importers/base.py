"""What every importer returns, and the reading of ids and interactions that importers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distrec.data.importers.rows import Rows
from distrec.data.importers.values import (
    first_true,
    is_string,
    labels,
    mixed_units,
    numbers,
    plain,
    refuse_empty,
    times,
)
from distrec.errors import InputError, first_few, shown

ImageReader = Callable[[np.ndarray], list[bytes | None]]
"""Maps catalogue rows to the bytes of their image files; None for an item without an image."""


Unknown = Literal["refuse", "drop", "keep"]
"""What happens to interactions with items that the catalogue lacks."""


_BLANK = r"^[\p{Z}\p{Cc}\p{Cf}]*$"
"""An id of which nothing can be seen: spaces, control characters, marks such as U+200B and U+FEFF."""


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
    where: Callable[[int], str]  # names a row by its file and its number there, for messages

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


@dataclass(frozen=True)
class Catalogue:
    """The items that a source declares."""

    ids: pa.Array  # [catalogue] int64 or string, distinct
    where: str  # what it is, in messages
    unknown: Unknown = "refuse"  # what happens to interactions with other items
    key: str = ""  # config key of `unknown`; empty if it cannot be set


@dataclass(frozen=True)
class Matched:
    """Interactions and the items that they and the catalogue have."""

    interactions: RawInteractions
    ids: pa.Array  # [items] the catalogue's ids, then those of unknown items that are kept
    catalogue_row: np.ndarray  # [items] row in `ids` of each element of `interactions.item_ids`
    notes: list[str]


def interactions(rows: Rows, columns: Columns, catalogue: Catalogue | None) -> Matched:
    """The interactions in `rows`; without a catalogue, the items are those of the rows.

    Raises:
        InputError: an id, rating, timestamp or label is invalid, or an item is not in the catalogue and is neither
            dropped nor kept.
    """
    if not rows.table.num_rows:
        raise InputError(f"file {rows.name} has no interactions; give a table with rows.")
    users, user = _codes(read_ids(rows, columns.user))
    items = read_ids(rows, columns.item)
    rating = None if columns.rating is None else numbers(rows, columns.rating)
    timestamp = None if columns.timestamp is None else times(rows, columns.timestamp)
    label = None if columns.split is None else labels(rows, columns.split)
    notes = [] if columns.timestamp is None or timestamp is None else mixed_units(rows, columns.timestamp, timestamp)
    if catalogue is None:
        item_ids, item = _codes(items)
        return Matched(
            RawInteractions(users, item_ids, user, item, rating, timestamp, label, _namer(rows)),
            item_ids,
            np.arange(len(item_ids)),
            notes,
        )
    known, items = same_type(catalogue.ids, items)
    found = pc.index_in(items, value_set=known)
    keep = np.ones(len(items), bool)
    if found.null_count:
        missing = pc.is_null(found).to_numpy()
        others = pc.unique(items.filter(pa.array(missing)))
        _unknown(rows, columns.item, catalogue, missing, others)
        if catalogue.unknown == "keep":
            known = pa.concat_arrays([known, others.cast(known.type)])
            found = pc.index_in(items, value_set=known)
            notes.append(f"kept {_several(missing, others, rows, catalogue)}; they have no content")
        else:
            keep = ~missing
            notes.append(f"dropped {_several(missing, others, rows, catalogue)}")
    catalogue_row = pc.sort_indices(known).to_numpy().astype(np.int64)
    place = found.filter(pa.array(keep)).to_numpy().astype(np.int64)

    def of(column: np.ndarray | None) -> np.ndarray | None:
        return column if column is None or keep.all() else column[keep]

    raw = RawInteractions(
        user_ids=users,
        item_ids=known.take(pa.array(catalogue_row)),
        user=user[keep],
        item=_inverse(catalogue_row)[place],
        rating=of(rating),
        timestamp=of(timestamp),
        label=of(label),
        where=_namer(rows, np.flatnonzero(keep)),
    )
    return Matched(raw, known, catalogue_row, notes)


def _namer(rows: Rows, kept: np.ndarray | None = None) -> Callable[[int], str]:
    """Names row i of those that were kept (default: all); without the table itself, which may be large."""
    bare = replace(rows, table=rows.table.schema.empty_table())
    return bare.at if kept is None else lambda row: bare.at(int(kept[row]))


def _unknown(rows: Rows, column: str, catalogue: Catalogue, missing: np.ndarray, others: pa.Array) -> None:
    """Refuse unknown items, unless they are kept or dropped and some rows remain."""
    if catalogue.unknown == "keep" or (catalogue.unknown == "drop" and not missing.all()):
        return
    row = int(np.flatnonzero(missing)[0])
    setting = f"set '{catalogue.key}: drop' or 'keep'" if catalogue.key else "remove the rows"
    item, remedy = shown(others[0], quoted=False), "write ids alike in both files" if missing.all() else setting
    raise InputError(
        f"{rows.at(row)}: {column} {item} is not among {catalogue.where}; {_count(missing, others)}; add them there, "
        f"or {remedy}."
    )


def _count(missing: np.ndarray, others: pa.Array) -> str:
    rows = f"{int(missing.sum()):,} of {len(missing):,} rows"
    return f"{rows} have unknown items ({len(others):,}: {_first(others)})"


def _several(missing: np.ndarray, others: pa.Array, rows: Rows, catalogue: Catalogue) -> str:
    return (
        f"{int(missing.sum()):,} of {len(missing):,} rows of {rows.name}, whose {len(others):,} items are not among "
        f"{catalogue.where}: {_first(others)}"
    )


def _first(others: pa.Array) -> str:
    return first_few((shown(other, quoted=False) for other in others), len(others), 5)


def read_ids(rows: Rows, column: str) -> pa.ChunkedArray:
    """A column of original ids, as non-negative int64 or as string.

    Delimited text does not declare the type. A column of plain integers becomes int64, unless that would lose a leading
    zero or sign, or one is negative or beyond 64 bits. So does a column of whole decimal numbers. Any other column is
    string. Unsigned integers and whole decimals beyond int64 become strings of their digits.

    Raises:
        InputError: an id is empty, blank or fractional, or a negative number in a column of numbers.
    """
    ids = plain(rows.table[column])
    refuse_empty(rows, column, ids)
    if is_string(ids.type):
        ids = ids.cast(pa.string())
        blank = pc.match_substring_regex(ids, _BLANK)
        if pc.any(blank).as_py():
            row = first_true(blank)
            raise InputError(
                f"{rows.at(row)}: {column} is blank ({shown(ids[row].as_py())}); fill it or remove the row."
            )
        return ids if rows.typed else _ids_from_text(rows, column, ids)
    if pa.types.is_floating(ids.type):
        return _not_negative(rows, column, _whole(rows, column, ids))
    if pa.types.is_integer(ids.type) or (pa.types.is_decimal(ids.type) and ids.type.scale == 0):
        try:
            return _not_negative(rows, column, ids.cast(pa.int64()))
        except pa.ArrowInvalid:
            return ids.cast(pa.string())
    raise InputError(f"file {rows.name}: column '{column}' holds {ids.type}; ids must be integers or strings.")


def _not_negative(rows: Rows, column: str, ids: pa.ChunkedArray) -> pa.ChunkedArray:
    if len(ids) and pc.min(ids).as_py() < 0:
        row = first_true(pc.less(ids, 0))
        raise InputError(
            f"{rows.at(row)}: {column} is {ids[row]}, a negative id; number from 0 or write the column as strings."
        )
    return ids


def _ids_from_text(rows: Rows, column: str, ids: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        numbers = ids.cast(pa.int64())
    except pa.ArrowInvalid:
        if pc.all(pc.match_substring_regex(ids, r"^-?[0-9]{1,15}(\.[0-9]*)?$")).as_py():
            numbers = _whole(rows, column, ids.cast(pa.float64()))
            return numbers if pc.min(numbers).as_py() >= 0 else ids
        return ids
    same = not len(ids) or (pc.min(numbers).as_py() >= 0 and numbers.cast(pa.string()).equals(ids))
    return numbers if same else ids


def _whole(rows: Rows, column: str, ids: pa.ChunkedArray) -> pa.ChunkedArray:
    values = ids.cast(pa.float64()).to_numpy()
    broken = ~np.isfinite(values) | (values != np.floor(values))
    if broken.any():
        row = int(np.flatnonzero(broken)[0])
        if np.isnan(values[row]):
            raise InputError(f"{rows.at(row)}: {column} is missing (NaN); fill it or remove the row.")
        what = "a fractional id" if np.isfinite(values[row]) else "not an id"
        raise InputError(f"{rows.at(row)}: {column} is {values[row]}, {what}; ids must be whole numbers.")
    large = np.abs(values) >= 2.0**53
    if large.any():
        row = int(np.flatnonzero(large)[0])
        raise InputError(
            f"{rows.at(row)}: {column} {values[row]:g} is too large for an exact whole number in a column of floats; "
            "write the column as integers or strings."
        )
    return pa.chunked_array([values.astype(np.int64)])


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
