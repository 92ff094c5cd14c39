"""What opening a prepared dataset checks: the manifest against itself, and the footer of every file against it.

A footer holds the file's schema, its number of rows, and the least and greatest value of the columns of each row group.
So the checks read a few kilobytes per file, whatever its size. `distrec check` adds those that need the data itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from distrec.data.manifest import CONTEXT, SPLITS, FeatureEntry, Manifest
from distrec.data.storage import Folder, open_parquet
from distrec.errors import InputError

MAY_BE_EMPTY = frozenset({"title", "text", "image"})
"""The columns in which a null is a value; in all others it is damage."""
_THREADS = 16  # footers are waited for, not computed
_IDS = {"index": pa.int32(), "original": pa.string()}
_LONGEST = 2**31 - 1  # a fixed-size list has an int32 length
Found = TypeVar("Found")


class Defect(NamedTuple):
    """A defect of a dataset: the file that has it, and a phrase for a message, which names that file."""

    file: str
    what: str


@dataclass(frozen=True)
class Layout:
    """What a file must hold.

    Attributes:
        columns: the type of every column, by name.
        index: the column that counts the rows up, if there is one, and its first value.
        below: columns of numbers from 0 up, and the number that each value is below.
    """

    columns: dict[str, pa.DataType]
    index: tuple[str, int] | None = None
    below: dict[str, int] = field(default_factory=dict)


@dataclass
class _Footer:
    """What one footer says: a defect, or by column the least and most rows in which it may be true or not empty."""

    defect: Defect | None = None
    least: Counter[str] = field(default_factory=Counter)
    most: Counter[str] = field(default_factory=Counter)


def first_defect(folder: Folder, manifest: Manifest, encoded: bool = True) -> Defect | None:
    """The first defect that shows without reading the data; None if there is none.

    Args:
        folder: the dataset's folder.
        manifest: its manifest.
        encoded: False: leave out the feature sets of `distrec encode`, which is about to write them again.

    Raises:
        InputError: the storage cannot be read.
    """
    features = {name: entry for name, entry in manifest.features.items() if encoded or not entry.encoded}
    what = next(_contradictions(manifest, features), None)
    if what is not None:
        return Defect("manifest.json", f"manifest.json {what}")
    layouts = _layouts(manifest, features)
    footers = {}
    for name, footer in in_threads(partial(_footer, folder, manifest, layouts), layouts, _THREADS):
        if footer.defect is not None:
            return footer.defect
        footers[name] = footer
    return next(_miscounted(manifest, features, footers), None)


def in_threads(work: Callable[[str], Found], names: Iterable[str], threads: int) -> Iterator[tuple[str, Found]]:
    """`work` of each name, in their order, done by several threads; what has not begun is left out after an error."""
    names = list(names)
    with ThreadPoolExecutor(threads) as pool:
        try:
            yield from zip(names, pool.map(work, names))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def reading_parquet(folder: Folder, manifest: Manifest, name: str) -> Iterator[None]:
    """A context that reads file `name` of a dataset.

    Raises:
        InputError: the file is absent, damaged, or the storage cannot be read.
    """
    try:
        with folder.reading(*name.split("/")):
            try:
                yield
            except (pa.ArrowException, ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as error:
                raise damaged(folder, manifest, _unreadable(name, error)) from None
    except FileNotFoundError:
        raise damaged(folder, manifest, Defect(name, f"'{name}' is listed in manifest.json but missing")) from None
    except OSError as error:  # pyarrow raises it about content, and `reading` has refused all others
        raise damaged(folder, manifest, _unreadable(name, error)) from None


def damaged(folder: Folder, manifest: Manifest, defect: Defect) -> InputError:
    """The error about a defect, with the command that writes the file again."""
    return InputError(f"data '{folder}': {defect.what}; {manifest.remedy(defect.file)}.")


def _unreadable(name: str, error: Exception) -> Defect:
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
    return Defect(name, f"'{name}' cannot be read as Parquet ({reason[:200]})")


def _contradictions(manifest: Manifest, features: dict[str, FeatureEntry]) -> Iterator[str]:
    """Where the manifest does not agree with itself, as phrases that follow "manifest.json"."""
    rows = {name: entry.rows for name, entry in manifest.files.items()}
    for side, count in (("users", manifest.users), ("items", manifest.items)):
        if f"{side}.parquet" not in rows:
            yield f"does not list '{side}.parquet'"
        elif rows[f"{side}.parquet"] != count:
            yield f"counts {count} {side} but gives '{side}.parquet' {rows[f'{side}.parquet']} rows"
    if unknown := set(manifest.interactions) - {*SPLITS, CONTEXT}:
        yield f"counts rows of split {min(unknown)!r}, which this version does not know"
    for split in (*SPLITS, CONTEXT):
        total = sum(rows[name] for name in manifest.parts(f"interactions/{split}"))
        if total != manifest.interactions.get(split, 0):
            yield f"counts {manifest.interactions.get(split, 0)} rows of '{split}' but lists files with {total} rows"
    for name, entry in features.items():
        for part in entry.parts:
            if not part.startswith(f"features/{name}/"):
                yield f"lists {part!r} as a part of feature '{name}', which has its own folder"
            elif part not in rows:
                yield f"does not list '{part}', a part of feature '{name}', among the files"
        if len(set(entry.parts)) < len(entry.parts):
            yield f"lists a part of feature '{name}' twice"
        total = sum(rows[part] for part in entry.parts)
        if total != manifest.items:
            yield f"counts {manifest.items} items but lists parts with {total} rows for feature '{name}'"
        if entry.missing > manifest.items:
            yield f"counts {entry.missing} missing of {manifest.items} items for feature '{name}'"
        if entry.tokens * entry.width > _LONGEST:
            yield f"gives feature '{name}' {entry.tokens} vectors of width {entry.width}, which no file can hold"
    if manifest.content and set(manifest.content) != {"text", "image"}:
        yield f"counts content {sorted(manifest.content)}, not 'image' and 'text'"
    total = sum(rows[part] for part in manifest.parts("content"))
    if total != (manifest.items if manifest.content else 0):
        yield f"counts {manifest.items} items with content {manifest.content} but lists content with {total} rows"


def _layouts(manifest: Manifest, features: dict[str, FeatureEntry]) -> dict[str, Layout]:
    """The layout of every file."""
    found = {"users.parquet": Layout(_IDS, index=("index", 0))}
    found["items.parquet"] = Layout({**_IDS, "title": pa.string()}, index=("index", 0))
    pairs = Layout(
        {"user": pa.int32(), "item": pa.int32(), "timestamp": pa.int64()},
        below={"user": manifest.users, "item": manifest.items},
    )
    for split in (*SPLITS, CONTEXT):
        found |= dict.fromkeys(manifest.parts(f"interactions/{split}"), pairs)

    def by_item(parts: list[str], columns: dict[str, pa.DataType], below: dict[str, int] | None = None) -> None:
        first = 0
        for part in parts:
            found[part] = Layout({"item": pa.int32(), **columns}, ("item", first), below or {})
            first += manifest.files[part].rows

    for entry in features.values():
        value = pa.float16() if entry.dtype == "float16" else pa.float32()
        columns = {"vector": pa.list_(value, entry.tokens * entry.width), "missing": pa.bool_()}
        if entry.tokens > 1:
            by_item(entry.parts, columns | {"count": pa.int32()}, below={"count": entry.tokens + 1})
        else:
            by_item(entry.parts, columns)
    by_item(manifest.parts("content"), {"text": pa.string(), "image": pa.binary()})
    return found


def _footer(folder: Folder, manifest: Manifest, layouts: dict[str, Layout], name: str) -> _Footer:
    out = _Footer()
    with reading_parquet(folder, manifest, name):
        file: pq.ParquetFile = open_parquet(folder, *name.split("/"))
        what = next(_misfits(file, manifest, name, layouts[name], out), None)
    if what is not None:
        out.defect = Defect(name, f"'{name}' {what}")
    return out


def _misfits(file: pq.ParquetFile, manifest: Manifest, name: str, layout: Layout, out: _Footer) -> Iterator[str]:
    """Where a footer does not agree with the layout, as phrases that follow the file's name; counts into `out`."""
    columns, rows = file.schema_arrow, manifest.files[name].rows
    if len(set(columns.names)) < len(columns.names):
        yield "has two columns of one name"
    types = dict(zip(columns.names, columns.types))
    for column, kind in layout.columns.items():
        if types.get(column) != kind:
            yield f"column '{column}' is {types.get(column, 'absent')}, must be {kind}"
    for column in types:
        if column not in layout.columns:
            yield f"has a column {column!r}, which this version does not know"
    metadata = file.metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    if metadata.num_rows != rows or sum(group.num_rows for group in groups) != rows:
        yield f"has {metadata.num_rows} rows but manifest.json says {rows}"
    at = 0
    for group in groups:
        for number in range(group.num_columns):
            yield from _misfits_of_column(group.num_rows, at, group.column(number), layout, out)
        at += group.num_rows


def _misfits_of_column(
    rows: int, at: int, chunk: pq.ColumnChunkMetaData, layout: Layout, out: _Footer
) -> Iterator[str]:
    """The same for one column of a row group, whose first row is row `at` of the file."""
    column = chunk.path_in_schema.partition(".")[0]
    kind, known = layout.columns[column], chunk.statistics
    each = kind.list_size if pa.types.is_fixed_size_list(kind) else 1
    if chunk.num_values != rows * each:
        yield f"has {chunk.num_values} values in column '{column}' for {rows} rows of {each}"
    if known is None:
        out.most[column] += rows
        return
    nulls = known.null_count if known.has_null_count else 0
    if nulls and column not in MAY_BE_EMPTY:
        yield f"has {nulls} empty values in column '{column}'"
    numbers = known.has_min_max and (pa.types.is_integer(kind) or pa.types.is_boolean(kind))
    low, high = (int(known.min), int(known.max)) if numbers else (0, 0)
    if layout.index is not None and layout.index[0] == column and numbers:
        first = layout.index[1] + at
        if (low, high) != (first, first + rows - 1):
            yield (
                f"has '{column}' from {low} to {high} where {first} to {first + rows - 1} belong (row {at} and after)"
            )
    if column in layout.below and numbers and not 0 <= low <= high < layout.below[column]:
        yield f"has {column} {low if low < 0 else high}, which is not from 0 to {layout.below[column] - 1}"
    surely, possibly = 0, rows
    if column in MAY_BE_EMPTY and known.has_null_count:
        surely = possibly = rows - nulls
    elif pa.types.is_boolean(kind) and numbers:  # false is less than true
        surely = rows if low else high
        possibly = rows - int(not low) if high else 0
    out.least[column] += surely
    out.most[column] += possibly


def _miscounted(manifest: Manifest, features: dict[str, FeatureEntry], footers: dict[str, _Footer]) -> Iterator[Defect]:
    """Counts of the manifest that the footers exclude."""
    counts = [(entry.parts, "missing", entry.missing, f"feature '{name}'") for name, entry in features.items()]
    for modality, items in manifest.content.items():
        counts.append((manifest.parts("content"), modality, items, f"content '{modality}'"))
    for parts, column, count, what in counts:
        least = sum(footers[part].least[column] for part in parts)
        most = sum(footers[part].most[column] for part in parts)
        if not least <= count <= most:
            found = least if least == most else f"{least} to {most}"
            said = "missing" if column == "missing" else "present"
            yield Defect(parts[0], f"manifest.json counts {count} items {said} of {what} but its files have {found}")
