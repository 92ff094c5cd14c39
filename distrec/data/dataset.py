"""The prepared dataset: what `distrec prepare` writes and everything else reads.

```
manifest.json                      written last: a folder without it is an unfinished prepare
interactions/{train,valid,test}/part-00000.parquet   user, item: int32; timestamp: int64. Some splits also have
                                   `interactions/context/`: known before valid and test, never trained on
users.parquet, items.parquet       index: int32; original: string; items also have title: string (nullable)
features/<name>/part-00000.parquet item: int32; vector: fixed-size list of float16/32; missing: bool;
                                   a token set (several vectors per item) also has count: int32
content/part-00000.parquet         item: int32; text: string (nullable); image: binary (nullable)
```

Users and items are numbered from 0. Feature and content parts hold all items in index order. In a token set, `vector`
is the concatenation of an item's tokens. The first `count` tokens are real; the others are zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from distrec.config import Section, decode, digest, nearest
from distrec.data.storage import Folder, open_folder, open_parquet, parquet_bytes, sha256
from distrec.errors import InputError

FORMAT = 1
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
CONTEXT: Literal["context"] = "context"
"""Interactions of held-out users. A ranking may read them, training must not. Most datasets have none."""
TOKENS = "-tokens"
"""Suffix of the name of a token set: `text-tokens` is the token set of modality `text`."""
COLD = 5
"""An item with at most this many training interactions is cold."""
_BYTES_PER_GROUP = 8 << 20


class FileEntry(Section):
    """One file of a prepared dataset."""

    rows: int = Field(description="number of rows in the file")
    bytes: int = Field(description="size of the file in bytes")
    sha256: str = Field(description="SHA-256 of the file's content, in hexadecimal")


class FeatureEntry(Section):
    """One feature set: a vector per item, or several (tokens)."""

    tokens: int = Field(1, ge=1, description="number of vectors per item")
    width: int = Field(description="length of each vector")
    dtype: Literal["float16", "float32"] = Field(description="number format of the vectors, float16 or float32")
    missing: int = Field(description="number of items without a vector")
    source: str = Field(description="encoder and its version, or the imported file")
    parts: list[str] = Field(description="files that hold the vectors, in index order")

    @model_serializer(mode="wrap")
    def _without_default(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `tokens: 1`, so that datasets older than token sets keep their identity."""
        tree: dict[str, Any] = dump(self)
        if self.tokens == 1:
            tree.pop("tokens", None)
        return tree


class Manifest(Section):
    """`manifest.json`."""

    format: int = Field(description="version of the format of prepared datasets")
    name: str = Field(description="name of the dataset")
    users: int = Field(description="number of users")
    items: int = Field(description="number of items")
    interactions: dict[str, int] = Field(description="number of interactions by split")
    split: str = Field(description="rule by which the interactions were split")
    id_order: str = Field(description="rule by which users and items were numbered")
    features: dict[str, FeatureEntry] = Field(description="feature sets by name")
    content: dict[str, int] = Field(
        description="number of items that have a text or an image, by modality; empty without content"
    )
    config: dict[str, Any] = Field(description="data config that the dataset was prepared with")
    source: str = Field("", description="SHA-256 over the source files; empty if there are none")
    files: dict[str, FileEntry] = Field(description="every file of the dataset by name")


@dataclass(frozen=True)
class Interactions:
    """Rows of one split, sorted by user, then time, then order in the source. All arrays are `[rows]`."""

    user: np.ndarray
    item: np.ndarray
    timestamp: np.ndarray

    def __len__(self) -> int:
        return len(self.user)


class Dataset:
    """Read access to a prepared dataset. Opening it reads only the manifest."""

    def __init__(self, folder: Folder, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self.users, self.items = manifest.users, manifest.items

    @classmethod
    def open(cls, path: str) -> Dataset:
        """Open the prepared dataset at a local path or `s3://` prefix.

        Raises:
            InputError: there is no dataset, its prepare did not finish, or its format is another one.
        """
        folder = open_folder(path)
        if not folder.exists("manifest.json"):
            state = "an interrupted prepare" if folder.names() else "nothing"
            raise InputError(
                f"data '{path}' has no manifest.json ({state} is there); run 'distrec prepare CONFIG --source DIR "
                f"--out {path}'."
            )
        try:
            tree = folder.read_json("manifest.json")
        except ValueError as error:
            raise InputError(
                f"data '{path}': manifest.json is not valid JSON ({error}); run 'distrec prepare' again."
            ) from None
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            found = tree.get("format") if isinstance(tree, dict) else type(tree).__name__
            raise InputError(
                f"data '{path}': manifest format is {found!r} but this version reads {FORMAT}; run 'distrec prepare' "
                "again."
            )
        try:
            return cls(folder, decode(Manifest, tree, "manifest"))
        except InputError as error:
            raise InputError(f"data '{path}': {error}") from None

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the manifest's content: the dataset's identity."""
        return digest(self.manifest.model_dump())

    def read_table(self, name: str, verify: bool = True) -> pa.Table:
        """Read one file of the manifest as a table.

        Raises:
            InputError: the file is missing or, with `verify`, does not match its recorded SHA-256.
        """
        entry = self.manifest.files[name]
        try:
            data = self.folder.read_bytes(name)
        except FileNotFoundError:
            raise InputError(
                f"data '{self.folder}': '{name}' is listed in manifest.json but missing; run 'distrec prepare' again."
            ) from None
        if verify and sha256(data) != entry.sha256:
            raise InputError(
                f"data '{self.folder}': checksum of '{name}' differs from manifest.json ({len(data)} bytes, expected "
                f"{entry.bytes}); run 'distrec prepare' again."
            )
        # Arrow's threads can outlive the call and then need the interpreter, which aborts a process that is ending.
        return pa.parquet.ParquetFile(pa.BufferReader(data)).read(use_threads=False)

    def interactions(self, split: Split | Literal["context"]) -> Interactions:
        """All rows of a split or of the context, with user and item as int32 and timestamp as int64.

        Raises:
            InputError: a file is missing or damaged, or an id is out of range.
        """
        parts = [
            self.read_table(name) for name in sorted(self.manifest.files) if name.startswith(f"interactions/{split}/")
        ]
        if not parts:
            empty = np.empty(0, np.int32)
            return Interactions(empty, empty, np.empty(0, np.int64))
        table = pa.concat_tables(parts)
        user, item, time = (table[column].to_numpy() for column in ("user", "item", "timestamp"))
        for name, ids, bound in (("user", user, self.users), ("item", item, self.items)):
            if len(ids) and (ids.min() < 0 or ids.max() >= bound):
                row = int(np.flatnonzero((ids < 0) | (ids >= bound))[0])
                raise InputError(
                    f"data '{self.folder}': {split} row {row} has {name} {ids[row]} but the manifest counts {bound} "
                    f"{name}s; run 'distrec prepare' again."
                )
        return Interactions(
            user.astype(np.int32, copy=False), item.astype(np.int32, copy=False), time.astype(np.int64, copy=False)
        )

    def feature(self, name: str) -> FeatureEntry:
        """The entry of a feature set.

        Raises:
            InputError: there is no feature set of that name.
        """
        if name not in self.manifest.features:
            known = list(self.manifest.features)
            hint = nearest(name, known) if known else "the dataset has no features; run 'distrec encode' or import some"
            raise InputError(f"data '{self.folder}' has no feature '{name}'; {hint}.")
        return self.manifest.features[name]

    def feature_rows(self, name: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows `start:stop` of a set: values `[rows, width]` float32 (zeros where missing) and missing `[rows]` bool.

        Reads only the row groups that hold these rows.

        Raises:
            InputError: there is no such set, or it has several vectors per item.
        """
        entry = self.feature(name)
        if entry.tokens > 1:
            raise InputError(
                f"data '{self.folder}': feature '{name}' has {entry.tokens} vectors per item but one is needed; "
                "name a set that 'distrec encode' writes without --tokens."
            )
        values = np.zeros((max(stop - start, 0), entry.width), np.float32)
        missing = np.zeros(len(values), bool)
        for rows, table in self._feature_tables(entry, start, stop, ["vector", "missing"]):
            values[rows] = vectors(table["vector"], entry.width)
            missing[rows] = table["missing"].to_numpy()
        values[missing] = 0
        return values, missing

    def token_rows(self, name: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows `start:stop` of a token set. Reads only the row groups that hold these rows.

        Returns:
            Values `[rows, tokens, width]` float16, zeros where an item is missing and after its real tokens; the number
            of real tokens, which come first, `[rows]` int32; missing `[rows]` bool.

        Raises:
            InputError: there is no such set, or it has one vector per item.
        """
        entry = self.feature(name)
        if entry.tokens == 1:
            raise InputError(
                f"data '{self.folder}': feature '{name}' has one vector per item but several are needed; name a "
                "set that 'distrec encode --tokens' writes."
            )
        values = np.zeros((max(stop - start, 0), entry.tokens, entry.width), np.float16)
        count = np.zeros(len(values), np.int32)
        missing = np.zeros(len(values), bool)
        for rows, table in self._feature_tables(entry, start, stop, ["vector", "count", "missing"]):
            values[rows] = vectors(table["vector"], entry.tokens * entry.width).reshape(-1, entry.tokens, entry.width)
            count[rows], missing[rows] = table["count"].to_numpy(), table["missing"].to_numpy()
        values[missing], count[missing] = 0, 0
        return values, count, missing

    def _feature_tables(
        self, entry: FeatureEntry, start: int, stop: int, columns: list[str]
    ) -> Iterator[tuple[slice, pa.Table]]:
        """Rows `start:stop` of a set, one row group at a time: their places within `start:stop`, and the rows."""
        first = 0
        for part in entry.parts:
            rows = self.manifest.files[part].rows
            if first < stop and first + rows > start:
                file = open_parquet(self.folder, part)
                at = first
                for group in range(file.num_row_groups):
                    count = file.metadata.row_group(group).num_rows
                    low, high = max(at, start), min(at + count, stop)
                    if low < high:
                        table = file.read_row_group(group, columns=columns)
                        yield slice(low - start, high - start), table.slice(low - at, high - low)
                    at += count
            first += rows

    def content(self, columns: list[str], batch_rows: int = 256) -> Iterator[pa.RecordBatch]:
        """Stream raw content in item order, as batches with `item` and those of `text` and `image` in `columns`."""
        for name in sorted(self.manifest.files):
            if name.startswith("content/"):
                yield from open_parquet(self.folder, name).iter_batches(batch_rows, columns=["item", *columns])

    def content_of(self, items: Sequence[int], columns: list[str]) -> Iterator[dict[str, Any]]:
        """Raw content of `items`, one dictionary each with `item` and `columns`, ascending by item.

        Reads only the row groups that hold these items.
        """
        wanted, first = np.unique(np.asarray(items, np.int64)), 0
        for name in sorted(self.manifest.files):
            if not name.startswith("content/"):
                continue
            rows = self.manifest.files[name].rows
            if ((wanted >= first) & (wanted < first + rows)).any():
                file, at = open_parquet(self.folder, name), first
                for group in range(file.num_row_groups):
                    count = file.metadata.row_group(group).num_rows
                    mine = wanted[(wanted >= at) & (wanted < at + count)]
                    if len(mine):
                        table = file.read_row_group(group, columns=["item", *columns])
                        yield from table.take(pa.array(mine - at)).to_pylist()
                    at += count
            first += rows

    def items_table(self) -> pa.Table:
        """`items.parquet`: index, original id, title."""
        return self.read_table("items.parquet")

    def users_table(self) -> pa.Table:
        """`users.parquet`: index, original id."""
        return self.read_table("users.parquet")


def vectors(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """Convert a column of fixed-size lists to an array `[rows, width]` of the same float type."""
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) for chunk in column.chunks]
    return np.concatenate(chunks) if chunks else np.empty((0, width), np.float32)


def vector_table(first_item: int, values: np.ndarray, missing: np.ndarray, count: np.ndarray | None = None) -> pa.Table:
    """Make a feature part for items `first_item`, `first_item + 1`, …

    Args:
        first_item: index of the first item.
        values: `[rows, width]` float16 or float32; for a token set `[rows, tokens * width]`.
        missing: `[rows]` bool.
        count: `[rows]` int32, the number of real tokens; only for a token set.
    """
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    items = np.arange(first_item, first_item + len(values), dtype=np.int32)
    columns = {"item": items, "vector": pa.FixedSizeListArray.from_arrays(flat, values.shape[1]), "missing": missing}
    return pa.table(columns if count is None else {**columns, "count": count})


def group_rows(row_bytes: int) -> int:
    """Rows per row group for rows of `row_bytes`: few for wide vectors, so that reading some items reads few others."""
    return max(1, min(65_536, _BYTES_PER_GROUP // row_bytes))


def write_part(folder: Folder, name: str, table: pa.Table, row_group_rows: int = 65_536) -> FileEntry:
    """Write one Parquet file of a dataset and return its manifest entry."""
    data = parquet_bytes(table, row_group_rows)
    folder.write_bytes(data, *name.split("/"))
    return FileEntry(rows=table.num_rows, bytes=len(data), sha256=sha256(data))


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    """Write `manifest.json`, atomically; always the last file of a prepare or encode."""
    folder.write_json(manifest.model_dump(), "manifest.json")
