"""Random prepared datasets of any size, with cold items, repeated pairs and missing features.

Every user has training items.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from distrec.data.dataset import vector_table, write_part
from distrec.data.manifest import SPLITS, FeatureEntry, FileEntry, Manifest, write_manifest
from distrec.data.storage import Folder, open_folder
from distrec.data.synth import write_ids

WIDTHS = {"text": 8, "image": 5}
TOKENS = {"text-tokens": (4, 6), "image-tokens": (3, 6)}  # tokens per item, and their width


def write_random(path: Path, users: int, items: int, train: int, seed: int) -> str:
    """Write a dataset with `train` training rows, and one valid and one test item per user; returns its path.

    Training rows use only the first 80 % of the items; the rest are cold.
    """
    rng, folder = np.random.default_rng(seed), open_folder(str(path))
    warm = max(4, items * 4 // 5)
    files, features, counts = write_ids(folder, users, items), {}, {}
    taste = rng.permutation(warm)
    for split in SPLITS:
        user = (
            np.concatenate([np.arange(users), rng.integers(0, users, train - users)])
            if split == "train"
            else np.arange(users)
        )
        user = np.sort(user)
        # Each user's items come from a window of half the warm items, so that negatives exist and a model can learn.
        near = taste[(user * 3 + rng.integers(0, warm // 2, len(user))) % warm]
        if split == "train":
            item = near
        else:
            item = np.where(user % 4 == 0, rng.integers(min(warm, items - 1), items, len(user)), near)
        time = train * SPLITS.index(split) + np.arange(len(user))  # the held-out items are the newest
        name = f"interactions/{split}/part-00000.parquet"
        table = {"user": user.astype(np.int32), "item": item.astype(np.int32), "timestamp": time}
        files[name], counts[split] = write_part(folder, name, pa.table(table)), len(user)
    for name, width in WIDTHS.items():
        values, missing = rng.normal(size=(items, width)).astype(np.float32), rng.random(items) < 0.15
        part = f"features/{name}/part-00000.parquet"
        files[part] = write_part(folder, part, vector_table(0, values, missing))
        features[name] = FeatureEntry(
            width=width, dtype="float32", missing=int(missing.sum()), source="drawn", parts=[part]
        )
    for name, shape in TOKENS.items():
        features[name], files[features[name].parts[0]] = write_tokens(folder, name, items, shape, seed)
    manifest = Manifest(
        format=1, name="random", users=users, items=items, interactions=counts, split="given", id_order="given",
        features=features, content={}, config={}, files=files,
    )  # fmt: skip
    write_manifest(folder, manifest)
    return str(path)


def write_tokens(
    folder: Folder, name: str, items: int, shape: tuple[int, int], seed: int
) -> tuple[FeatureEntry, FileEntry]:
    """Write a random token set of `shape` (tokens, width) per item.

    Texts have different numbers of tokens, images have all of them, and some items have none.
    """
    rng, (tokens, width) = np.random.default_rng([seed, len(name)]), shape
    missing = rng.random(items) < 0.15
    count = np.where(missing, 0, rng.integers(1, tokens + 1, items) if name.startswith("text") else tokens)
    values = rng.normal(size=(items, tokens, width)).astype(np.float16)
    values[np.arange(tokens) >= count[:, None]] = 0
    part = f"features/{name}/part-00000.parquet"
    file = write_part(folder, part, vector_table(0, values.reshape(items, -1), missing, count.astype(np.int32)))
    entry = FeatureEntry(
        tokens=tokens, width=width, dtype="float16", missing=int(missing.sum()), source="drawn", parts=[part]
    )
    return entry, file
