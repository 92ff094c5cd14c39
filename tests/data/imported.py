"""Datasets that the importer `tables` makes of the source folder `raw`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distrec.data.dataset import Dataset
from distrec.errors import InputError
from tests.data.raw import SOURCE, prepared

ITEMS = {"files": "items.parquet", "id": "i"}


def tables(tmp: Path, out: str = "out", keep: str = "all", order: str = "shuffled", **importer: Any) -> Dataset:
    parts = {"interactions": {"files": "interactions.parquet", **SOURCE}, **importer}
    return prepared(tmp, parts, out=out, keep_items=keep, id_order=order)


def original(dataset: Dataset) -> list[int]:
    return [int(value) for value in dataset.items_table()["original"].to_pylist()]


def refuse(tmp: Path, match: str, **importer: Any) -> None:
    """Assert that prepare fails with one matching sentence and leaves no dataset behind."""
    with pytest.raises(InputError, match=match) as caught:
        tables(tmp, out="refused", **importer)
    assert "\n" not in str(caught.value)
    assert not (tmp / "refused/manifest.json").exists()
