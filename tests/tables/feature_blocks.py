"""Datasets with feature and token sets, and a check of their blocks that runs in one or several processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distrec.data.dataset import Dataset, vector_table, write_part
from distrec.data.manifest import FeatureEntry, Manifest, write_manifest
from distrec.data.storage import open_folder
from distrec.errors import InputError
from distrec.parallel.partition import Partition
from distrec.parallel.world import World
from distrec.tables.features import feature_block, token_block

CASES = {"some": (11, [2, 3, 10]), "none": (7, []), "all": (4, [0, 1, 2, 3]), "one": (1, [])}


def write(folder: Path) -> None:
    root, rng, files, features = open_folder(str(folder)), np.random.default_rng(0), {}, {}
    for name, (items, missing) in CASES.items():
        values = rng.normal(size=(items, 4)).astype(np.float32)
        part = f"features/{name}/part-00000.parquet"
        gone = np.isin(np.arange(items), missing)
        files[part] = write_part(root, part, vector_table(0, values, gone))
        np.save(folder / f"{name}.npy", values)
        features[name] = FeatureEntry(width=4, dtype="float32", missing=len(missing), source="drawn", parts=[part])
        tokens, part = tokens_of(items, missing), f"features/{name}-tokens/part-00000.parquet"
        count = (tokens != 0).any(2).sum(1).astype(np.int32)
        files[part] = write_part(root, part, vector_table(0, tokens.reshape(items, -1), gone, count), row_group_rows=2)
        features[f"{name}-tokens"] = FeatureEntry(
            tokens=3, width=4, dtype="float16", missing=len(missing), source="drawn", parts=[part]
        )
    for name, tokens in (("broken", None), ("broken-tokens", np.ones(7, np.int32))):  # the last rank's rows, if several
        values, part = np.zeros((7, 4), np.float16), f"features/{name}/part-00000.parquet"
        values[-1, 2] = np.nan
        files[part] = write_part(root, part, vector_table(0, values, np.zeros(7, bool), tokens))
        shape = {"tokens": 2, "width": 2} if tokens is not None else {"width": 4}
        features[name] = FeatureEntry(dtype="float16", missing=0, source="drawn", parts=[part], **shape)
    manifest = Manifest(
        format=1, name="made", users=1, items=1, interactions={"train": 0, "valid": 0, "test": 0}, split="given",
        id_order="given", content={}, features=features, config={}, files=files,
    )  # fmt: skip
    write_manifest(root, manifest)


def tokens_of(items: int, missing: list[int]) -> np.ndarray:
    """Values `[items, 3, 4]`: item i has 1 + i % 3 tokens, and a missing item has none."""
    values = np.random.default_rng(items).normal(size=(items, 3, 4)).astype(np.float16)
    values[np.arange(3) > np.arange(items)[:, None] % 3] = 0
    values[missing] = 0
    return values


def check(folder: str) -> None:
    world, data = World.current(), Dataset.open(folder, checked=True)
    for refused in (
        lambda items: feature_block(world, items, data, "broken", "zeros"),
        lambda items: token_block(world, items, data, "broken-tokens"),
    ):
        with pytest.raises(InputError, match="item 6: feature 2 is nan"):  # on every rank
            refused(Partition(7, world.size))
    for name, (items, missing) in CASES.items():
        values = np.load(Path(folder) / f"{name}.npy")
        present = np.delete(values.astype(np.float64), missing, axis=0)
        partition = Partition(items, world.size)
        mine = slice(partition.start(world.rank), partition.stop(world.rank))
        fills = {"mean": present.mean(0) if len(present) else np.zeros(4), "zeros": np.zeros(4)}
        for fill, vector in fills.items():
            wanted = values.copy()
            wanted[missing] = vector
            found = feature_block(world, partition, data, name, fill)  # type: ignore[arg-type]
            assert found.dtype == torch.float32
            np.testing.assert_allclose(found.numpy(), wanted[mine], rtol=1e-6, atol=1e-7)
        block, tokens = token_block(world, partition, data, f"{name}-tokens"), tokens_of(items, missing)
        real = (tokens != 0).any(2)
        real[missing, 0] = True
        assert block.values.dtype == torch.float16
        assert np.array_equal(block.values.numpy(), tokens[mine])
        assert block.mask.dtype == torch.bool
        assert np.array_equal(block.mask.numpy(), real[mine])
