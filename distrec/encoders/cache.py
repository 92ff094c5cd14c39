"""Vectors kept by what they were made from: `<cache>/<encoder key>/part-*.parquet`.

A part holds the vectors of one shard of contents, each under the hash of its content. Parts are written once and never
changed, so a part that is there is complete: what an interrupted run had finished is found again, and so is what an
earlier run, another prepare or another item with the same content has already paid for. Deleting a cache only
costs time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distrec.data.dataset import group_rows, vectors
from distrec.data.storage import Folder, open_parquet, parquet_bytes
from distrec.errors import InputError

HASH_BYTES = 16


def content_hash(content: str | bytes) -> bytes:
    """The 16 bytes under which the vector of a text or an image file is kept."""
    data = content.encode() if isinstance(content, str) else content
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


def keep_part(
    folder: Folder, hashes: Sequence[bytes], values: np.ndarray, missing: np.ndarray, count: np.ndarray | None = None
) -> str:
    """Keep `values` `[n, length]` float16 of contents with `hashes`; `missing` marks those that could not be encoded.

    `count` `[n]` int32 are the real tokens of each, where an encoder gives several vectors.
    """
    name = f"part-{hashlib.blake2b(b''.join(hashes), digest_size=12).hexdigest()}.parquet"
    table: dict[str, Any] = {
        "hash": pa.array(hashes, pa.binary(HASH_BYTES)),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1]),
        "missing": missing,
    }
    if count is not None:
        table["count"] = count
    rows = group_rows(values.shape[1] * values.itemsize)
    folder.write_bytes(parquet_bytes(pa.table(table), rows, dictionary=count is None), name)
    return name


class Cache:
    """What is kept for an encoder of `tokens` vectors of `width` per item, found by hash. Opening reads only hashes."""

    def __init__(self, folder: Folder, tokens: int, width: int):
        self.folder, self._length = folder, tokens * width
        self._columns = ["vector", "missing", *(["count"] if tokens > 1 else [])]
        self._parts: list[str] = []
        self._where: dict[bytes, tuple[int, int]] = {}  # hash -> part, row
        for name in folder.names():
            if name.endswith(".parquet"):
                self.add(name)

    def add(self, name: str) -> None:
        """Take a part that has been written into account."""
        hashes = self._read(name, ["hash"])["hash"].to_pylist()
        self._where.update({key: (len(self._parts), row) for row, key in enumerate(hashes)})
        self._parts.append(name)

    def __contains__(self, key: bytes) -> bool:
        return key in self._where

    def rows(self, hashes: Sequence[bytes | None]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """What is kept under the hashes.

        Returns:
            Vectors `[n, tokens * width]` float16, zeros where missing; missing `[n]` bool, which a hash of None also
            is; and, of several tokens, how many are real, `[n]` int32, none where missing.
        """
        values = np.zeros((len(hashes), self._length), np.float16)
        missing = np.ones(len(hashes), bool)
        count = np.zeros(len(hashes), np.int32) if "count" in self._columns else None
        wanted: dict[int, list[tuple[int, int]]] = {}
        for at, key in enumerate(hashes):
            if key is not None:
                part, row = self._where[key]
                wanted.setdefault(part, []).append((at, row))
        for part, pairs in wanted.items():
            table = self._read(self._parts[part], self._columns)
            to, source = (list(column) for column in zip(*pairs))
            values[to] = vectors(table["vector"], self._length)[source]
            missing[to] = table["missing"].to_numpy()[source]
            if count is not None:
                count[to] = table["count"].to_numpy()[source]
        return values, missing, count

    def _read(self, name: str, columns: list[str]) -> pa.Table:
        try:
            file: pq.ParquetFile = open_parquet(self.folder, name)
            return file.read(columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"encoder cache '{self.folder}': '{name}' cannot be read ({error}); delete that file and encode again."
            ) from None
