"""Parquet files in a `Folder`."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from distrec.data.storage import Folder


def parquet_bytes(table: pa.Table, row_group_rows: int = 65_536, dictionary: bool = True) -> bytes:
    """The bytes of a Parquet file with `table`; `dictionary` stores repeated values once."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=row_group_rows, use_dictionary=dictionary)
    return sink.getvalue().to_pybytes()


def open_parquet(folder: Folder, *parts: str) -> pq.ParquetFile:
    """Open a Parquet file inside `folder`; row groups are read when asked for."""
    return pq.ParquetFile(folder.open(*parts))
