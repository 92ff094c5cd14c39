"""Precomputed features: `.npy` by row, Parquet by row or id. They stay on disk and are checked before any output."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from distrec.config import Section
from distrec.data.importers.base import RawFeature, read_ids, same_type
from distrec.data.importers.source import Files, Rows, Source, Span, unreadable
from distrec.errors import InputError

_CHUNK = 4096  # rows processed at a time


class FeatureFiles(Section):
    """Files and columns of one feature set."""

    files: Files = Field(description="one .npy file, or Parquet files by name or pattern")
    id: str | None = Field(
        None, description="column of item ids in Parquet files; null: row i belongs to the i-th item"
    )
    column: str = Field("vector", description="column of vectors in Parquet files")
    zeros_are_missing: bool = Field(False, description="take a row of zeros for an item without this modality")


def read_feature(source: Source, name: str, config: FeatureFiles, catalogue: pa.Array, where: str) -> RawFeature:
    """The feature set `name` in catalogue order.

    Args:
        source: The source folder.
        name: Name of the feature set; its config key is `importer.features.<name>`.
        config: Files and columns of the set.
        catalogue: `[items]` original ids.
        where: Name of the catalogue in error messages.

    Raises:
        InputError: the rows do not match the items, the widths differ, or a value is not a finite float.
    """
    names = source.files(config.files, f"importer.features.{name}.files")
    if all(file.lower().endswith(".npy") for file in names):
        if len(names) > 1 or config.id is not None:
            raise InputError(
                f"key 'importer.features.{name}': a .npy set is one file without an id column; join the files or give "
                "Parquet."
            )
        values = load_npy(source, names[0])
        present = np.ones(len(values), bool)
        _check_rows(f"'{names[0]}'", len(values), len(catalogue), where)
    else:
        values, present = _parquet(source, name, names, config, catalogue, where)
    zero = _check_values(values, names[0] if len(names) == 1 else f"{names[0]} …")
    return RawFeature(values, ~present | (zero & config.zeros_are_missing), ", ".join(names))


def with_missing(source: Source, name: str, feature: RawFeature, more: int) -> RawFeature:
    """The feature set `name` with `more` items at its end that have no vector; a copy on disk if there are any."""
    if not more:
        return feature
    count, width = feature.values.shape
    shape = (count + more, width)
    values = np.lib.format.open_memmap(source.scratch / f"longer-{name}.npy", "w+", feature.values.dtype, shape)
    values[:count] = feature.values
    return RawFeature(values, np.append(feature.missing, np.ones(more, bool)), feature.source)


def stored_type(values: np.ndarray) -> np.dtype:
    """The float type in which features are stored: float64 becomes float32, the others stay."""
    return np.dtype(np.float16 if values.dtype == np.float16 else np.float32)


def load_npy(source: Source, name: str) -> np.ndarray:
    """The array `[rows, width]` of floats in file `name`, memory-mapped.

    Raises:
        InputError: the file is not such an array.
    """
    try:
        with np.errstate(over="ignore"):
            values = np.load(source.local(name), mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a header is a Python literal with a shape of any numbers, so it may raise anything
        raise unreadable(name, "NumPy array", error) from None
    if not isinstance(values, np.ndarray):
        values.close()
        raise InputError(f"file '{name}' is an archive of arrays (.npz); save one array with numpy.save.")
    if values.ndim != 2 or not values.shape[1]:
        raise InputError(f"file '{name}' has shape {list(values.shape)}; features are [items, width].")
    _check_type(f"'{name}'", values.dtype)
    return values


def _parquet(
    source: Source, feature: str, names: list[str], config: FeatureFiles, catalogue: pa.Array, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors `[items, width]` in catalogue order, in a scratch file, and whether each item has one, bool `[items]`."""
    columns = [config.column] if config.id is None else [config.column, config.id]
    values: np.ndarray | None = None
    present = np.zeros(len(catalogue), bool)
    before = 0
    for name in names:
        first = 0
        for batch in source.batches(name, columns, _CHUNK):
            if not len(batch):
                continue
            block, there = _vectors(name, first, config.column, batch.column(0))
            if values is None:
                path = source.scratch / f"feature-{feature}.npy"
                shape = (len(catalogue), block.shape[1])
                values = np.lib.format.open_memmap(path, "w+", block.dtype, shape)
            if block.shape[1] != values.shape[1] or block.dtype != values.dtype:
                raise InputError(
                    f"'{name}' row {first}: a vector of {block.shape[1]} {block.dtype} but others have "
                    f"{values.shape[1]} {values.dtype}; make them equal."
                )
            if config.id is None:
                if before + len(block) > len(catalogue):
                    rows = sum(source.parquet(n, columns).metadata.num_rows for n in names)
                    _check_rows(f"'{name}'", rows, len(catalogue), where)
                at = np.arange(before, before + len(block))
            else:
                at = _find(name, first, config.id, batch, catalogue)
                there = there & (at >= 0)
            taken = at[there]
            repeated = present[taken] | ~_first_of_each(taken)
            if repeated.any():
                row = int(np.flatnonzero(there)[repeated][0])
                raise InputError(
                    f"'{name}' row {first + row}: a second vector for {config.id} {batch.column(1)[row]}; keep one."
                )
            values[taken] = block[there]
            present[taken] = True
            first += len(block)
            before += len(block)
    if values is None:
        raise InputError(f"file '{names[0]}' has no feature rows; give one row per item.")
    if config.id is None:
        _check_rows(f"'{names[0]}'", before, len(catalogue), where)
    elif not present.any():
        raise InputError(
            f"file '{names[0]}': no {config.id} is among {where}; check key 'importer.features.{feature}.id'."
        )
    return values, present


def _vectors(name: str, first: int, column: str, array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """A list column as `[rows, width]`, zeros where null, and which rows are not null, bool `[rows]`."""
    kind = array.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise InputError(f"file '{name}': column '{column}' holds {kind}; features must be lists of floats.")
    there = array.is_valid().to_numpy(zero_copy_only=False)
    width = pc.list_value_length(array).drop_null().to_numpy()
    if not len(width):
        raise InputError(
            f"'{name}' rows {first} to {first + len(array) - 1}: '{column}' is empty; leave such rows out."
        )
    if (width != width[0]).any():
        row = int(np.flatnonzero(there)[np.flatnonzero(width != width[0])[0]])
        raise InputError(
            f"'{name}' row {first + row}: '{column}' has width {len(array[row])} but others have {width[0]}; make them "
            "equal."
        )
    if array.drop_null().flatten().null_count:
        raise InputError(f"file '{name}': column '{column}' contains an empty number; fill it or leave the vector out.")
    flat = array.drop_null().flatten().to_numpy(zero_copy_only=False)
    _check_type(f"'{name}' column '{column}'", flat.dtype)
    block = np.zeros((len(array), int(width[0])), flat.dtype)
    block[there] = flat.reshape(-1, int(width[0]))
    return block, there


def _find(name: str, first: int, column: str, batch: pa.RecordBatch, catalogue: pa.Array) -> np.ndarray:
    """The catalogue row of each row of `batch`, `[rows]`; -1 for an id that is not in the catalogue."""
    spans = [Span(name, range(first, first + len(batch)))]
    rows = Rows(pa.Table.from_batches([batch]), [(name, len(batch))], typed=True, spans=spans)
    known, ids = same_type(catalogue, read_ids(rows, column))
    return pc.fill_null(pc.index_in(ids, value_set=known), -1).to_numpy().astype(np.int64)


def _first_of_each(values: np.ndarray) -> np.ndarray:
    first = np.zeros(len(values), bool)
    first[np.unique(values, return_index=True)[1]] = True
    return first


def _check_rows(file: str, rows: int, items: int, where: str) -> None:
    if rows != items:
        raise InputError(f"file {file} has {rows} feature rows for {items} items ({where}); give one row per item.")


def _check_type(where: str, dtype: np.dtype) -> None:
    if dtype not in (np.float16, np.float32, np.float64):
        raise InputError(f"file {where} holds {dtype}; features must be float16, float32 or float64.")


def _check_values(values: np.ndarray, name: str) -> np.ndarray:
    """Refuse NaN, infinity and values too large for float32; return which rows are all zeros, bool `[rows]`."""
    zero = np.zeros(len(values), bool)
    for start in range(0, len(values), _CHUNK):
        with np.errstate(over="ignore"):
            block = np.asarray(values[start : start + _CHUNK]).astype(stored_type(values), copy=False)
        if not np.isfinite(block).all():
            row, column = np.argwhere(~np.isfinite(block))[0]
            raise InputError(
                f"'{name}' row {start + row}: feature {column} is {values[start + row, column]}; give finite numbers "
                "or leave the row out."
            )
        zero[start : start + _CHUNK] = ~block.any(axis=1)
    return zero
