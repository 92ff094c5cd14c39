"""Raw content of items: texts from a template with column names, images from a folder or a Parquet column."""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distrec.data.importers.base import ImageReader, read_ids, same_type
from distrec.data.importers.source import Rows, Source, Span
from distrec.errors import InputError

_SEPARATORS = " \t\n.,;:|/-"


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Split a template such as `"{title}. {overview}"` into pairs of a literal and the column after it.

    Raises:
        ValueError: the braces are not balanced, a column has a format, or there is no column.
    """
    parts = []
    for literal, column, form, conversion in string.Formatter().parse(template):
        if column is not None and (not column or form or conversion):
            raise ValueError("must name a column in each pair of braces and nothing else")
        parts.append((literal, column))
    if all(column is None for _, column in parts):
        raise ValueError("must hold at least one {column}")
    return parts


def template_columns(template: str | None) -> list[str]:
    """The columns that a template names, in order."""
    return [column for _, column in parse_template(template) if column is not None] if template else []


def texts(rows: Rows, template: str, only_if: Mapping[str, str]) -> pa.Array:
    """One text per row; null if every column of the template is empty.

    An empty column disappears together with the literal before it, and separators that would then start the text are
    removed, so `"{title}. Genres: {genres}. {overview}"` reads well whatever is missing. Lists are joined by `", "`.

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
        there = pc.fill_null(pc.not_equal(value, ""), False)
        if column in only_if:
            there = pc.and_(there, _flags(rows, only_if[column]))
        before = literal if not pieces else pc.if_else(any_column, literal, literal.lstrip(_SEPARATORS))
        piece = pc.if_else(there, pc.binary_join_element_wise(before, value, ""), "")
        pieces.append(piece)
        any_column = pc.or_(any_column, there)
    text = pc.binary_join_element_wise(*pieces, tail, "")
    return pc.if_else(any_column, text, None)


def strings(rows: Rows, column: str) -> pa.Array:
    """A column as trimmed strings. Lists are joined by `", "`; numbers and Booleans are written out; null stays."""
    values = rows.table[column].combine_chunks()
    kind = values.type
    try:
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            values = pc.binary_join(values.cast(pa.list_(pa.string())), ", ")
        return pc.utf8_trim_whitespace(values.cast(pa.string()))
    except pa.ArrowException:
        raise InputError(
            f"file {rows.name}: column '{column}' holds {kind}; a text needs strings, numbers or lists of strings."
        ) from None


def _flags(rows: Rows, column: str) -> pa.Array:
    try:
        return pc.fill_null(rows.table[column].combine_chunks().cast(pa.bool_()), False)
    except pa.ArrowException:
        raise InputError(
            f"file {rows.name}: column '{column}' holds {rows.table[column].type}; a condition must be true or false."
        ) from None


def images_in_folder(source: Source, rows: Rows, template: str, key: str) -> ImageReader:
    """Reader of image files that a template with columns of the items table names, such as `pics/{id}.jpg`.

    Raises:
        InputError: the template names no existing file.
    """
    parts = parse_template(template)
    pieces = [
        piece for literal, column in parts for piece in ([literal, strings(rows, column)] if column else [literal])
    ]
    names = pc.binary_join_element_wise(*pieces, "").to_pylist()
    folder = parts[0][0].rpartition("/")[0]
    there = source.listing(folder)
    names = [name if name in there else None for name in names]
    if not any(names):
        raise InputError(
            f"key '{key}': '{template}' names no file in source '{source.folder}' ({len(there)} files below "
            f"'{folder}'); correct the template."
        )
    at = {name: source.folder.at(name) for name in names if name is not None}

    def read(wanted: np.ndarray) -> list[bytes | None]:
        chosen = [names[row] for row in wanted]
        paths = [at[name] for name in chosen if name is not None]
        found = source.folder.fs.cat(paths) if paths else {}  # one concurrent request on an object store
        return [None if name is None else found[at[name]] or None for name in chosen]

    return read


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
