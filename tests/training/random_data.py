"""Random prepared datasets of any shape: cold items, repeated pairs, missing features; every user has a training item."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from distrec.data.dataset import SPLITS, FeatureEntry, Manifest, vector_table, write_manifest, write_part
from distrec.data.storage import open_folder

WIDTHS = {"text": 8, "image": 5}


def write_random(path: Path, users: int, items: int, train: int, seed: int) -> str:
    """`train` training rows over the first 80 % of items (the rest are cold) and one valid and test item per user."""
    rng, folder = np.random.default_rng(seed), open_folder(str(path))
    warm = max(4, items * 4 // 5)
    files, features, counts = {}, {}, {}
    taste = rng.permutation(warm)
    for split in SPLITS:
        user = (
            np.concatenate([np.arange(users), rng.integers(0, users, train - users)])
            if split == "train"
            else np.arange(users)
        )
        user = np.sort(user)
        # Each user chooses from a window of half the warm items, so negatives exist and there is something to learn.
        near = taste[(user * 3 + rng.integers(0, warm // 2, len(user))) % warm]
        item = near if split == "train" else np.where(user % 4 == 0, rng.integers(warm, items, len(user)), near)
        name = f"interactions/{split}/part-00000.parquet"
        table = {"user": user.astype(np.int32), "item": item.astype(np.int32), "timestamp": np.arange(len(user))}
        files[name], counts[split] = write_part(folder, name, pa.table(table)), len(user)
    for name, width in WIDTHS.items():
        values, missing = rng.normal(size=(items, width)).astype(np.float32), rng.random(items) < 0.15
        part = f"features/{name}/part-00000.parquet"
        files[part] = write_part(folder, part, vector_table(0, values, missing))
        features[name] = FeatureEntry(
            width=width, dtype="float32", missing=int(missing.sum()), source="drawn", parts=[part]
        )
    manifest = Manifest(
        format=1, name="random", users=users, items=items, interactions=counts, split="given", id_order="given",
        features=features, content={}, config={}, files=files,
    )  # fmt: skip
    write_manifest(folder, manifest)
    return str(path)
