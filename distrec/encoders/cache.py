"""A cache of vectors, keyed by the content they were made from: `<cache>/<encoder key>/part-*.parquet`.

A part holds the vectors of one shard of contents, each with the hash of its content. Parts are written atomically and
never changed, so every existing part is complete. An interrupted run finds its finished parts again. Equal content is
encoded once, also across items, runs and datasets. Deleting a cache costs only time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distrec.data.dataset import group_rows, vectors
from distrec.data.parquet import open_parquet, parquet_bytes
from distrec.data.storage import Folder
from distrec.errors import InputError

HASH_BYTES = 16


def content_hash(content: str | bytes) -> bytes:
    """The 16-byte key of a text or an image file in the cache."""
    data = content.encode() if isinstance(content, str) else content
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


def keep_part(
    folder: Folder, hashes: Sequence[bytes], values: np.ndarray, missing: np.ndarray, count: np.ndarray | None = None
) -> str:
    """Write one part of a cache and return its file name.

    Args:
        folder: the cache folder of one encoder.
        hashes: `[n]` content hashes.
        values: `[n, length]` float16 vectors.
        missing: `[n]` bool, true for contents that could not be encoded.
        count: `[n]` int32, number of real tokens; only for encoders that give several vectors.
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
    """The cached vectors of one encoder, found by content hash. Opening it reads only the hashes.

    Args:
        folder: the cache folder of the encoder.
        tokens: vectors per item.
        width: length of each vector.
    """

    def __init__(self, folder: Folder, tokens: int, width: int):
        self.folder, self._length = folder, tokens * width
        self._columns = ["vector", "missing", *(["count"] if tokens > 1 else [])]
        self._parts: list[str] = []
        self._where: dict[bytes, tuple[int, int]] = {}  # hash -> part, row
        for name in folder.names():
            if name.endswith(".parquet"):
                self.add(name)

    def add(self, name: str) -> None:
        """Add part `name`, which has been written to the folder."""
        hashes = self._read(name, ["hash"])["hash"].to_pylist()
        self._where.update({key: (len(self._parts), row) for row, key in enumerate(hashes)})
        self._parts.append(name)

    def __contains__(self, key: bytes) -> bool:
        return key in self._where

    def rows(self, hashes: Sequence[bytes | None]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Look up hashes, which must be in the cache. A hash of None counts as missing.

        Returns:
            Vectors `[n, tokens * width]` float16, zeros where missing; missing `[n]` bool; and the number of real
            tokens `[n]` int32, 0 where missing, or None for an encoder with one vector per item.
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
