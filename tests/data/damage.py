"""Damage to a prepared dataset that is signed again, so that only the content is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distrec.data.check import check
from distrec.data.storage import sha256
from distrec.errors import InputError


def edit(out: Path, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Replace a file by a changed one that the manifest agrees with."""
    table = change(pq.read_table(out / name))
    pq.write_table(table, out / name)
    sign(out, name, table.num_rows)


def sign(out: Path, name: str, rows: int | None = None) -> None:
    """Enter size, checksum and, if given, rows of a file into the manifest."""
    data = (out / name).read_bytes()
    entry = {"bytes": len(data), "sha256": sha256(data)} | ({} if rows is None else {"rows": rows})
    edit_manifest(out, lambda tree: tree["files"].setdefault(name, {}).update(entry))


def edit_manifest(out: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tree = json.loads((out / "manifest.json").read_text())
    change(tree)
    (out / "manifest.json").write_text(json.dumps(tree))


def with_value(column: str, row: int, value: Any) -> Callable[[pa.Table], pa.Table]:
    """A change of one value in a table."""

    def change(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        values[row] = value
        kind = table.schema.field(column).type
        return table.set_column(table.column_names.index(column), column, pa.array(values, kind))

    return change


def refuse(out: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        check(str(out))
    assert "\n" not in str(caught.value)
