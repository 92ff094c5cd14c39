"""Rows divided into Parquet files: the files depend only on the rows, not on the tables in which they arrive."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distrec.data.parts import Parts
from distrec.data.storage import open_folder, sha256

WHOLE = pa.table({"item": np.arange(25, dtype=np.int32), "text": [f"{i} " * 10 for i in range(25)]})


def written(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((path / "content").iterdir())}


@pytest.mark.parametrize("cuts", [[], [1, 2, 3, 11, 12], [10], [3, 3, 10, 20], list(range(1, 25))])
def test_parts_have_so_many_rows_however_these_come(tmp_path: Path, cuts: list[int]) -> None:
    for name, places in (("cut", [0, *cuts, 25]), ("fitting", [0, 10, 20, 25])):
        parts = Parts(open_folder(str(tmp_path / name)), "content", 10, group_rows=4)
        for start, stop in pairwise(places):
            parts.add(WHOLE.slice(start, stop - start))
        files = parts.close()
        assert [entry.rows for entry in files.values()] == [10, 10, 5]
        assert list(files) == [f"content/part-0000{number}.parquet" for number in range(3)]
        for file, entry in files.items():
            data = (tmp_path / name / file).read_bytes()
            assert (len(data), sha256(data)) == (entry.bytes, entry.sha256)
    assert written(tmp_path / "cut") == written(tmp_path / "fitting")
    assert pq.read_table(tmp_path / "cut/content").equals(WHOLE)
    assert pq.ParquetFile(tmp_path / "cut/content/part-00000.parquet").metadata.row_group(0).num_rows == 4


def test_a_part_ends_with_the_table_that_reaches_its_bytes(tmp_path: Path) -> None:
    parts = Parts(open_folder(str(tmp_path)), "content", 1000, most_bytes=WHOLE.slice(0, 6).nbytes)
    for start in range(0, 25, 4):
        parts.add(WHOLE.slice(start, 4))
    assert [entry.rows for entry in parts.close().values()] == [8, 8, 8, 1]
    assert pq.read_table(tmp_path / "content").equals(WHOLE)


def test_known_files_are_not_written_again(tmp_path: Path) -> None:
    folder = open_folder(str(tmp_path))

    def write(table: pa.Table, known: dict) -> dict:
        parts = Parts(folder, "content", 10, known=known)
        parts.add(table)
        return parts.close()

    first = write(WHOLE, {})
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "content").iterdir()}
    assert write(WHOLE, first) == first
    other = WHOLE.set_column(1, "text", pa.array(["other" if i == 12 else f"{i} " * 10 for i in range(25)]))
    second = write(other, first)
    assert [old == new for old, new in zip(first, second)] == [True, False, True]
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "content").iterdir()}
    assert before.items() <= after.items()
    assert len(after) == 4
    name, entry = next(iter(second.items()))
    for damage in (Path.unlink, lambda path: path.write_bytes(b"other")):
        damage(tmp_path / name)
        assert write(other, second) == second
        assert sha256((tmp_path / name).read_bytes()) == entry.sha256


def test_no_rows_make_no_part(tmp_path: Path) -> None:
    parts = Parts(open_folder(str(tmp_path)), "content", 10)
    parts.add(WHOLE.slice(0, 0))
    assert parts.close() == {}
    assert not any(tmp_path.iterdir())
