"""A fixture with the published program's numbers, and the prepared dataset and config that repeat its run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distrec.config.run import RunConfig
from distrec.config.tree import decode
from distrec.data.dataset import Dataset, vector_table, write_part
from distrec.data.manifest import SPLITS, FeatureEntry, Manifest, write_manifest
from distrec.data.storage import open_folder
from distrec.data.synth import write_ids
from distrec.methods.registry import resolve


class Fixture:
    """The arrays of one `.npz` file, by key."""

    def __init__(self, path: str):
        with np.load(path, allow_pickle=False) as archive:
            self._arrays = {key: archive[key] for key in archive.files}

    def under(self, prefix: str) -> Fixture:
        """A second run in the file: its own arrays under `prefix/`, and the first run's arrays for all other keys."""
        mine = {key: self[f"{prefix}/{key}"] for key in self.keys(prefix)}
        out = object.__new__(Fixture)
        shared = {key: x for key, x in self._arrays.items() if key.startswith(("data/", "batch/", "hparams/"))}
        out._arrays = shared | mine
        return out

    def __contains__(self, key: str) -> bool:
        return key in self._arrays

    def __getitem__(self, key: str) -> np.ndarray:
        return self._arrays[key]

    def hparam(self, name: str) -> Any:
        """`hparams/NAME` as a Python number or string."""
        return self[f"hparams/{name}"].item()

    def count(self, side: str) -> int:
        """The number of "users" or "items"."""
        return int(self[f"data/n_{side}"])

    def keys(self, prefix: str) -> list[str]:
        """The keys under `prefix/`, without the prefix."""
        return [key.removeprefix(f"{prefix}/") for key in self._arrays if key.startswith(f"{prefix}/")]


Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Users, items and times of a split."""


def write_dataset(fixture: Fixture, folder: Path, features: dict[str, np.ndarray]) -> Dataset:
    """The fixture's interactions and features as a prepared dataset, in the project's own format."""
    splits = {}
    for split in SPLITS:
        user, item = fixture[f"data/{split}_user"], fixture[f"data/{split}_item"]
        splits[split] = (user, item, np.zeros(len(user), np.int64))
    return write(folder, fixture.count("users"), fixture.count("items"), splits, features, {})


def write(
    folder: Path,
    users: int,
    items: int,
    splits: Mapping[str, Pairs],
    features: Mapping[str, np.ndarray],
    tokens: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> Dataset:
    """Write a prepared dataset from arrays.

    Args:
        features: vectors `[items, width]`, by name.
        tokens: values `[items, tokens, width]` and the number of real tokens `[items]`, by name.
    """
    root = open_folder(str(folder))
    files, entries, counts = write_ids(root, users, items), {}, {}
    for split, (user, item, time) in splits.items():
        order = np.argsort(user, kind="stable")
        columns = {"user": user[order].astype(np.int32), "item": item[order].astype(np.int32), "timestamp": time[order]}
        name = f"interactions/{split}/part-00000.parquet"
        files[name], counts[split] = write_part(root, name, pa.table(columns)), len(user)
    present = np.zeros(items, bool)
    for name, values in features.items():
        part = f"features/{name}/part-00000.parquet"
        files[part] = write_part(root, part, vector_table(0, values.astype(np.float32), present))
        entries[name] = FeatureEntry(width=values.shape[1], dtype="float32", missing=0, source="fixture", parts=[part])
    for name, (values, count) in tokens.items():
        part, (_, length, width) = f"features/{name}/part-00000.parquet", values.shape
        flat = values.reshape(items, -1).astype(np.float16)
        files[part] = write_part(root, part, vector_table(0, flat, present, count.astype(np.int32)))
        entries[name] = FeatureEntry(
            tokens=length, width=width, dtype="float16", missing=0, source="fixture", parts=[part]
        )
    manifest = Manifest(
        format=1,
        name="fixture",
        users=users,
        items=items,
        interactions=counts,
        split="given",
        id_order="given",
        features=entries,
        content={},
        config={},
        files=files,
    )
    write_manifest(root, manifest)
    return Dataset.open(str(folder))


def adam(fixture: Fixture) -> dict[str, Any]:
    """The optimizer settings of a fixture that was trained with Adam."""
    h = fixture.hparam
    return {
        "name": "adam",
        "lr": h("learning_rate"),
        "betas": [h("adam_beta1"), h("adam_beta2")],
        "eps": h("adam_eps"),
        "weight_decay": h("weight_decay"),
    }


def run_config(method: dict[str, Any], optimizer: dict[str, Any], global_batch: int, zero_stage: int) -> RunConfig:
    """A resolved run config for a replay."""
    tree = {
        "data": "fixture",
        "run": {"name": "oracle"},
        "method": method,
        "optimizer": optimizer,
        "train": {"global_batch": global_batch},
        "dense": {"zero_stage": zero_stage},
    }
    return resolve(decode(RunConfig, tree))
