"""Raw content of items: texts from a template with column names, images from a folder or a Parquet column."""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distrec.data.importers.base import ImageReader, read_ids, same_type
from distrec.data.importers.source import Rows, Source, Span
from distrec.data.storage import Folder
from distrec.errors import InputError, first_few, shown

_SEPARATORS = " \t\n.,;:|/-"
_PIECE = re.compile(r"\{\{|\}\}|\{(?P<column>[^{}]*)\}|[{}]|[^{}]+")
_WIDEST = 120  # characters of a file name in a note
_LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Split a template such as `"{title}. {overview}"` into pairs of a literal and the column after it.

    A column has any name without braces. `{{` and `}}` stand for braces in the literal.

    Raises:
        ValueError: the braces are not balanced, or a pair of them is empty, or there is no column.
    """
    parts: list[tuple[str, str | None]] = []
    literal = ""
    for match in _PIECE.finditer(template):
        piece, column = match[0], match["column"]
        if column is None and piece in ("{", "}"):
            fault = "is not closed" if piece == "{" else "closes nothing"
            raise ValueError(f"has a brace that {fault}; put the name of a column in braces, or double the brace")
        if column is None:
            literal += piece[0] if piece in ("{{", "}}") else piece
            continue
        if not column.strip():
            raise ValueError("must name a column in each pair of braces")
        parts.append((literal, column))
        literal = ""
    if not parts:
        raise ValueError("must hold at least one {column}")
    return [*parts, (literal, None)] if literal else parts


def template_columns(template: str | None) -> list[str]:
    """The columns that a template names, in order."""
    return [column for _, column in parse_template(template) if column is not None] if template else []


def texts(rows: Rows, template: str, only_if: Mapping[str, str]) -> pa.Array:
    """One text per row; null if every column of the template is empty.

    An empty column disappears together with the literal before it, and separators that would then start the text are
    removed, so `"{title}. Genres: {genres}. {overview}"` reads well whatever is missing.

    Args:
        rows: The items table.
        template: The text, with column names in braces.
        only_if: For some columns, the Boolean column that must be true for the column to be used.

    Returns:
        `[rows]` string, nullable.
    """
    pieces: list[pa.Array] = []
    any_column = pa.array(np.zeros(rows.table.num_rows, bool))
    tail = ""
    for literal, column in parse_template(template):
        if column is None:
            tail = literal
            continue
        value = strings(rows, column)
        there = pc.is_valid(value)
        if column in only_if:
            there = pc.and_(there, _flags(rows, only_if[column]))
        before = literal if not pieces else pc.if_else(any_column, literal, literal.lstrip(_SEPARATORS))
        piece = pc.if_else(there, pc.binary_join_element_wise(before, value, ""), "")
        pieces.append(piece)
        any_column = pc.or_(any_column, there)
    text = pc.binary_join_element_wise(*pieces, tail, "")
    return pc.if_else(any_column, text, None)


def strings(rows: Rows, column: str) -> pa.Array:
    """A column as trimmed strings, null where there is nothing to read.

    Numbers and Booleans are written out. Lists, also nested ones, are joined by `", "`, without their nulls and blank
    strings.

    Raises:
        InputError: the column holds something else, such as mappings.
    """
    try:
        return _written(rows.table[column].combine_chunks())
    except pa.ArrowException:
        raise InputError(
            f"file {rows.name}: column '{column}' holds {rows.table[column].type}; a text needs strings, numbers or "
            "lists of them."
        ) from None


def _written(values: pa.Array) -> pa.Array:
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    kind = values.type
    if pa.types.is_dictionary(kind):
        return _written(values.dictionary_decode())
    if any(is_list(kind) for is_list in _LISTS):
        return _joined(values)
    if pa.types.is_nested(kind):
        raise pa.ArrowTypeError(f"{kind} is neither a value nor a list")
    if pa.types.is_floating(kind):
        values = pc.if_else(pc.is_nan(values), None, values)  # what pandas writes for a missing value
    text = pc.utf8_trim_whitespace(values.cast(pa.string()))
    return pc.if_else(pc.equal(text, ""), None, text)


def _joined(lists: pa.Array) -> pa.Array:
    """Each list's elements that can be read, joined by `", "`; null if there are none."""
    there = pc.is_valid(lists)
    rows = np.flatnonzero(there.to_numpy(zero_copy_only=False))
    filled = lists.filter(there)  # elements may lie behind a null
    element = _written(pc.list_flatten(filled))
    real = pc.is_valid(element)
    row = rows[pc.list_parent_indices(filled).filter(real).to_numpy()]
    end = np.cumsum(np.bincount(row, minlength=len(lists)))
    joined = pa.LargeListArray.from_arrays(np.concatenate([[0], end]), element.filter(real))
    text = pc.binary_join(joined, ", ").cast(pa.string())
    return pc.if_else(pc.equal(text, ""), None, text)


def _flags(rows: Rows, column: str) -> pa.Array:
    try:
        return pc.fill_null(rows.table[column].combine_chunks().cast(pa.bool_()), False)
    except pa.ArrowException:
        raise InputError(
            f"file {rows.name}: column '{column}' holds {rows.table[column].type}; a condition must be true or false."
        ) from None


def images_in_folder(
    source: Source, rows: Rows, ids: pa.Array, template: str, key: str
) -> tuple[ImageReader, list[str]]:
    """Reader of image files that a template with columns of the items table names, such as `pics/{id}.jpg`.

    A name that leads out of the source, absolute or with a part `..`, is not read. An empty file is an image that
    `distrec encode` counts as damaged.

    Args:
        source: The source.
        rows: The items table.
        ids: Original ids of its rows, for messages.
        template: The name of the image file, relative to the source, with column names in braces.
        key: The config key of the template, for messages.

    Returns:
        The reader, and notes on items whose file is not there.

    Raises:
        InputError: the template names no existing file.
    """
    place = _tidy(parse_template(template)[0][0].rpartition("/")[0])
    if place:
        source.require_inside(place, key)
    names = _file_names(rows, template)
    outside = {row: name for row, name in enumerate(names) if name is not None and _leads_out(name)}
    inside = {name for name in names if name is not None} - set(outside.values())
    found = source.sizes(inside, place) if inside else {}
    lacking = {row: name for row, name in enumerate(names) if name in inside and name not in found}
    near = _Near(source.folder)
    notes = _note(lacking, ids, "name a file that does not exist", near)
    notes += _note(outside, ids, "name a file outside the source, which is not read", lambda name: None)
    if not found:
        raise InputError(
            f"key '{key}': '{template}' names no file in source '{source.folder}' "
            f"({'; '.join(notes) or 'every name is empty'}); correct the template."
        )
    for row in (*lacking, *outside):
        names[row] = None

    def read(wanted: np.ndarray) -> list[bytes | None]:
        chosen = [names[row] for row in wanted]
        there = list(dict.fromkeys(name for name in chosen if name is not None))
        # One concurrent request on an object store. fs.cat would treat '[' and '*' in names as patterns.
        data = source.folder.fs.cat_ranges([source.folder.at(name) for name in there], None, None) if there else []
        for name, content in zip(there, data):
            if isinstance(content, BaseException):
                raise InputError(f"image '{name}' of the source cannot be read ({content}); check its permissions.")
        content_of = dict(zip(there, data))
        return [None if name is None else bytes(content_of[name]) for name in chosen]

    return read, [f"image: {note}" for note in notes]


def _file_names(rows: Rows, template: str) -> list[str | None]:
    """The file that the template names for each row, without parts `.`; None if all its columns are empty."""
    pieces: list[Any] = []
    named = pa.array(np.zeros(rows.table.num_rows, bool))
    for literal, column in parse_template(template):
        pieces.append(literal)
        if column is not None:
            value = strings(rows, column)
            named = pc.or_(named, pc.is_valid(value))
            pieces.append(pc.fill_null(value, ""))
    names = pc.if_else(named, pc.binary_join_element_wise(*pieces, ""), None).to_pylist()
    return [None if name is None else _tidy(name) for name in names]


def _tidy(name: str) -> str:
    """`name` without parts that are empty or `.`, as listings have it."""
    root = "/" if name.startswith("/") else ""
    return root + "/".join(part for part in name.split("/") if part not in ("", "."))


def _leads_out(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/")


def _note(names: dict[int, str], ids: pa.Array, what: str, near: Callable[[str], str | None]) -> list[str]:
    """A sentence on the rows `names`, of all rows `ids`; none if there are no such rows."""
    if not names:
        return []

    def told(row: int, name: str) -> str:
        other = near(name)
        return f"{shown(name, _WIDEST)} of item {ids[row]}" + (f" (there is {shown(other, _WIDEST)})" if other else "")

    first = first_few((told(row, name) for row, name in names.items()), len(names))
    return [f"{len(names):,} of {len(ids):,} items {what}, first {first}"]


class _Near:
    """Finds the file that was probably meant by a name that does not exist.

    Its parts may differ in case, in the form of accents and in the kind of slash; its last part also in the ending, in
    leading zeros, and by a `.0` from a column of decimal numbers.
    """

    def __init__(self, folder: Folder):
        self._folder = folder
        self._listed: dict[str, list[str]] = {}

    def __call__(self, name: str) -> str | None:
        place = ""
        parts = [part for part in name.replace("\\", "/").split("/") if part]
        for at, part in enumerate(parts):
            forms = (_same, _stem, _number) if at == len(parts) - 1 else (_same,)
            here = self._names(place)
            there = [other for form in (str, *forms) for other in here if form(other) == form(part)]
            if not there:
                return None
            place = posixpath.join(place, there[0])
        return None if place == name else place

    def _names(self, place: str) -> list[str]:
        if place not in self._listed:
            try:
                self._listed[place] = self._folder.names(place)
            except (InputError, FileNotFoundError):  # one that may not be read, or no folder
                self._listed[place] = []
        return self._listed[place]


def _same(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _stem(name: str) -> str:
    return posixpath.splitext(_same(name))[0]


def _number(name: str) -> str:
    return _stem(name).removesuffix(".0").lstrip("0")


class ImagesInTable:
    """Reader of images in a bytes column of Parquet files, which may be in any order.

    The first call streams the images of the catalogue into one scratch file. From there they can be read in any order
    with little memory, and no Parquet file is decoded twice.
    """

    def __init__(self, source: Source, names: list[str], id_column: str, bytes_column: str, catalogue: pa.Array):
        self._source, self._names, self._columns, self._catalogue = source, names, (id_column, bytes_column), catalogue
        self._store: Path | None = None
        self._start = np.zeros(len(catalogue), np.int64)
        self._size = np.zeros(len(catalogue), np.int64)
        for name in names:
            kind = source.parquet(name, self._columns).schema_arrow.field(bytes_column).type
            if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)):
                raise InputError(
                    f"file '{name}': column '{bytes_column}' holds {kind}; images must be a column of bytes."
                )

    def __call__(self, wanted: np.ndarray) -> list[bytes | None]:
        """The images of catalogue rows `wanted`."""
        if self._store is None:
            self._store = self._copy()
        found: list[bytes | None] = []
        with open(self._store, "rb") as store:
            for row in wanted:
                store.seek(self._start[row])
                found.append(store.read(self._size[row]) or None)
        return found

    def _copy(self) -> Path:
        path, end = self._source.scratch / "images", 0
        with open(path, "wb") as store:
            for name in self._names:
                first = 0
                for batch in self._source.batches(name, self._columns, rows=64):
                    table = pa.Table.from_batches([batch])
                    spans = [Span(name, range(first, first + len(batch)))]
                    ids = read_ids(Rows(table, [(name, len(batch))], typed=True, spans=spans), self._columns[0])
                    catalogue, ids = same_type(self._catalogue, ids)
                    where = pc.index_in(ids, value_set=catalogue).to_pylist()
                    for i, (row, image) in enumerate(zip(where, batch.column(1))):
                        if row is None or not image.is_valid:
                            continue
                        if self._size[row]:
                            raise InputError(
                                f"'{name}' row {first + i}: a second image for {self._columns[0]} {ids[i]}; keep one."
                            )
                        self._start[row], self._size[row] = end, store.write(image.as_buffer())
                        end += int(self._size[row])
                    first += len(batch)
        if not self._size.any():
            raise InputError(
                f"file '{self._names[0]}': no {self._columns[0]} with an image is among the items; check key "
                "'importer.images.id'."
            )
        return path
