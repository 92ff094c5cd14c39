"""Small raw data sets for the tests of `distrec prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from distrec.data.dataset import Dataset
from distrec.data.prepare import prepare

SOURCE = {"user": "u", "item": "i", "rating": "r", "timestamp": "t"}


def interactions(seed: int, users: int = 40, items: int = 25, rows: int = 600) -> dict[str, np.ndarray]:
    """Random rows without repeated pairs, in random order: at least 3 per user, many equal times, ids with gaps."""
    rng = np.random.default_rng(seed)
    first = np.stack(
        [np.repeat(np.arange(users), 3), np.concatenate([rng.permutation(items)[:3] for _ in range(users)])]
    )
    more = np.stack([rng.integers(0, users, rows), rng.integers(0, items, rows)])
    pairs = np.unique(np.concatenate([first, more], axis=1), axis=1)
    pairs = pairs[:, rng.permutation(pairs.shape[1])]
    count = pairs.shape[1]
    rating = rng.integers(1, 11, count) / 2
    return {"u": pairs[0] * 3 + 5, "i": pairs[1] * 7 + 2, "r": rating, "t": rng.integers(0, 50, count)}


def write(path: Path, columns: dict[str, Any]) -> None:
    """Write a table as .parquet, .csv or .tsv, depending on the suffix of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    mark = "," if path.suffix == ".csv" else "\t"
    lines = [mark.join(table.column_names)]
    lines += [mark.join("" if v is None else str(v) for v in row.values()) for row in table.to_pylist()]
    path.write_text("\n".join(lines) + "\n")


def config(path: Path, importer: dict[str, Any] | None = None, **keys: Any) -> Path:
    """Write a data config; by default it imports `interactions.parquet` (see `interactions`) and splits by time."""
    importer = importer or {"interactions": {"files": "interactions.parquet", **SOURCE}}
    tree = {"name": "small", "importer": {"name": "tables", **importer}, "split": {"name": "per_user_time"}, **keys}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


def prepared(tmp: Path, importer: dict[str, Any] | None = None, out: str = "out", **keys: Any) -> Dataset:
    """Prepare the source folder `tmp/raw` into `tmp/<out>`."""
    return prepare(str(config(tmp / "data.yaml", importer, **keys)), str(tmp / "raw"), str(tmp / out))


def original_rows(dataset: Dataset) -> set[tuple[str, str, int, str]]:
    """Every interaction as (user id, item id, time, split), in original ids."""
    user = np.array(dataset.users_table()["original"].to_pylist())
    item = np.array(dataset.items_table()["original"].to_pylist())
    rows: set[tuple[str, str, int, str]] = set()
    for split in ("train", "valid", "test"):
        found = dataset.interactions(split)
        rows |= set(
            zip(user[found.user].tolist(), item[found.item].tolist(), found.timestamp.tolist(), [split] * len(found))
        )
    return rows
