"""What opening a prepared dataset checks: the manifest against itself, and the footer of every file against it.

A footer holds the file's schema and its number of rows. So the checks read a few kilobytes per file, whatever its size.
What needs the data itself is checked where the data is read (`distrec.data.dataset`) and by `distrec check`. A footer
also holds the range of each column, but pyarrow ends the whole process when it looks for that in some damaged footers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from distrec.config.bounds import MOST_NUMBERS
from distrec.data.manifest import CONTEXT, SPLITS, FeatureEntry, FileEntry, Manifest
from distrec.data.storage import Folder
from distrec.errors import InputError, shown

_THREADS = 16  # footers are waited for, not computed
_IDS = {"index": pa.int32(), "original": pa.string()}
_INTERACTIONS = {"user": pa.int32(), "item": pa.int32(), "timestamp": pa.int64()}
_CONTENT = {"item": pa.int32(), "text": pa.string(), "image": pa.binary()}
Found = TypeVar("Found")


class Defect(NamedTuple):
    """A defect of a dataset: the file that has it, and a phrase for a message, which names that file."""

    file: str
    what: str


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
    schemas = _schemas(manifest, features)
    for _, defect in in_threads(partial(_misfit, folder, manifest, schemas), schemas, _THREADS):
        if defect is not None:
            return defect
    return None


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
    return InputError(f"data '{folder}': {defect.what}; {manifest.remedy(defect.file, folder)}.")


def _unreadable(name: str, error: Exception) -> Defect:
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
    return Defect(name, f"'{name}' cannot be read as Parquet ({shown(reason, 200, quoted=False)})")


def _contradictions(manifest: Manifest, features: dict[str, FeatureEntry]) -> Iterator[str]:
    """Where the manifest does not agree with itself, as phrases that follow "manifest.json"."""
    rows = {name: entry.rows for name, entry in manifest.files.items()}
    for side, count in (("users", manifest.users), ("items", manifest.items)):
        if f"{side}.parquet" not in rows:
            yield f"does not list '{side}.parquet'"
        elif rows[f"{side}.parquet"] != count:
            yield f"counts {count} {side} but gives '{side}.parquet' {rows[f'{side}.parquet']} rows"
    if lacking := [split for split in SPLITS if split not in manifest.interactions]:
        yield f"does not count the rows of split '{lacking[0]}'"
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
        if entry.tokens * entry.width > MOST_NUMBERS:
            yield f"gives feature '{name}' {entry.tokens} vectors of width {entry.width}, which no file can hold"
    if manifest.content and set(manifest.content) != {"text", "image"}:
        yield f"counts content {sorted(manifest.content)}, not 'image' and 'text'"
    total = sum(rows[part] for part in manifest.parts("content"))
    if total != (manifest.items if manifest.content else 0):
        yield f"counts {manifest.items} items with content {manifest.content} but lists content with {total} rows"


def _schemas(manifest: Manifest, features: dict[str, FeatureEntry]) -> dict[str, dict[str, pa.DataType]]:
    """By file: the type of every column, by name."""
    found = {"users.parquet": _IDS, "items.parquet": {**_IDS, "title": pa.string()}}
    for split in (*SPLITS, CONTEXT):
        found |= dict.fromkeys(manifest.parts(f"interactions/{split}"), _INTERACTIONS)
    for entry in features.values():
        value = pa.float16() if entry.dtype == "float16" else pa.float32()
        vector = pa.list_(value, entry.tokens * entry.width)
        columns = {"item": pa.int32(), "vector": vector, "missing": pa.bool_()}
        found |= dict.fromkeys(entry.parts, columns | ({"count": pa.int32()} if entry.tokens > 1 else {}))
    return found | dict.fromkeys(manifest.parts("content"), _CONTENT)


def _misfit(folder: Folder, manifest: Manifest, schemas: dict[str, dict[str, pa.DataType]], name: str) -> Defect | None:
    with reading_parquet(folder, manifest, name), folder.open(*name.split("/")) as data:
        what = next(_misfits(data, manifest.files[name], schemas[name]), None)
    return None if what is None else Defect(name, f"'{name}' {what}")


def _misfits(data: Any, entry: FileEntry, columns: dict[str, pa.DataType]) -> Iterator[str]:
    """Where a file does not agree with the manifest, as phrases that follow the file's name."""
    if data.size != entry.bytes:
        yield f"has {data.size:,} bytes but manifest.json says {entry.bytes:,}"
    file = pq.ParquetFile(data)
    schema = file.schema_arrow
    found = dict(zip(schema.names, schema.types))
    if len(found) < len(schema.names):
        yield "has two columns of one name"
    for column, kind in columns.items():
        if found.get(column) != kind:
            yield f"column '{column}' is {found.get(column, 'absent')}, must be {kind}"
    for column in found:
        if column not in columns:
            yield f"has a column {column!r}, which this version does not know"
    rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    if file.metadata.num_rows != entry.rows or sum(rows) != entry.rows or min(rows, default=0) < 0:
        yield f"has {file.metadata.num_rows} rows but manifest.json says {entry.rows}"
