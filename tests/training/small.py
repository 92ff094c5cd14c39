"""A small prepared dataset with features, and run configs for it that train in seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml
from safetensors import safe_open

from distrec.data.dataset import vector_table, write_part
from distrec.data.manifest import FORMAT, SPLITS, FeatureEntry, FileEntry, Manifest, write_manifest
from distrec.data.storage import open_folder
from distrec.training.engine import Engine
from tests.methods import beside
from tests.training.random_data import write_tokens

USERS, ITEMS = 61, 37  # divided by no number of workers


def write_small(path: Path | str, seed: int = 0) -> str:
    """Write a dataset of `USERS` x `ITEMS`; returns its path.

    Each user has 6 to 12 training items, 1 valid item and 1 test item. The features are `text` (width 8, one row
    missing) and `image` (width 5), and there are token sets of the same widths.
    """
    rng, folder = np.random.default_rng(seed), open_folder(str(path))
    rows: dict[str, list[tuple[int, int]]] = {split: [] for split in SPLITS}
    for user in range(USERS):
        items = rng.permutation(ITEMS)[: rng.integers(8, 15)].tolist()
        rows["valid"].append((user, items[0]))
        rows["test"].append((user, items[1]))
        rows["train"] += [(user, item) for item in items[2:]]
    files: dict[str, FileEntry] = {}
    for split, pairs in rows.items():
        user, item = np.array(pairs, np.int32).T
        time = 1000 * SPLITS.index(split) + np.arange(len(user), dtype=np.int64)  # the held-out items are the newest
        table = pa.table({"user": user, "item": item, "timestamp": time})
        files[f"interactions/{split}/part-00000.parquet"] = write_part(
            folder, f"interactions/{split}/part-00000.parquet", table
        )
    for side, count in (("users", USERS), ("items", ITEMS)):
        columns: dict[str, Any] = {
            "index": np.arange(count, dtype=np.int32),
            "original": [f"{side[0]}{n}" for n in range(count)],
        }
        if side == "items":
            columns["title"] = [f"title {n}" for n in range(count)]
        files[f"{side}.parquet"] = write_part(folder, f"{side}.parquet", pa.table(columns))
    features = {}
    for name, width, missing in (("text", 8, [3]), ("image", 5, [])):
        values = rng.normal(size=(ITEMS, width)).astype(np.float32)
        gone = np.isin(np.arange(ITEMS), missing)
        values[gone] = 0
        part = f"features/{name}/part-00000.parquet"
        files[part] = write_part(folder, part, vector_table(0, values, gone))
        features[name] = FeatureEntry(width=width, dtype="float32", missing=len(missing), source="drawn", parts=[part])
    for name, shape in {"text-tokens": (4, 8), "image-tokens": (3, 5)}.items():
        features[name], files[features[name].parts[0]] = write_tokens(folder, name, ITEMS, shape, seed)
    manifest = Manifest(
        format=FORMAT, name="small", users=USERS, items=ITEMS, split="given", id_order="sorted", content={},
        interactions={split: len(pairs) for split, pairs in rows.items()}, features=features, config={}, files=files,
    )  # fmt: skip
    write_manifest(folder, manifest)
    return str(path)


def write_config(path: Path, data: str, storage: Path | str, name: str = "lightgcn", **sections: Any) -> str:
    """Write a run config; returns its path.

    The run trains method `name` with its small settings in this process, for 3 epochs with batches of 64 rows;
    `sections` are merged in.
    """
    tree: dict[str, Any] = {
        "data": data,
        "run": {"name": "run", "storage": str(storage)},
        "method": beside.settings(name),
        "train": {"workers": 0, "epochs": 3, "global_batch": 64, "cpus_per_worker": 0.5},
        "tracking": {"tensorboard": False},
    }
    for key, section in sections.items():
        tree[key] = {**tree.get(key, {}), **section} if isinstance(section, dict) else section
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The epochs in `metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def planted_epoch(number: int, **more: Any) -> dict[str, Any]:
    """A line of `metrics.jsonl` that nobody trained."""
    seconds = {"train": 1.0, "evaluate": 0.1, "checkpoint": 0.1}
    return {"epoch": number, "loss": {"bpr": 0.5}, "seconds": seconds, "replayed": 0, "rows_per_second": 9.0, **more}


def read(run: Path, name: str) -> Any:
    """A JSON file of a run."""
    return json.loads((run / name).read_text())


def read_yaml(path: Path) -> Any:
    """A YAML file."""
    return yaml.safe_load(path.read_text())


def checkpoints(run: Path) -> list[str]:
    """Names of the checkpoint folders, oldest first."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def tensors(run: Path, name: str | None = None) -> dict[str, torch.Tensor]:
    """The whole tensors of a checkpoint (the newest unless named), read without the project's own code."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for path in (run / "checkpoints" / (name or checkpoints(run)[-1])).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            first_rows = json.loads(file.metadata()["first_rows"])
            for key in file.keys():  # noqa: SIM118 -- not a mapping
                parts.setdefault(key, {})[first_rows.get(key, 0)] = file.get_tensor(key)
    return {
        key: rows[0] if len(rows) == 1 else torch.cat([rows[first] for first in sorted(rows)])
        for key, rows in parts.items()
    }


@contextmanager
def crash_at(*places: tuple[int, int]) -> Iterator[list[tuple[int, int]]]:
    """Make training in this process crash before the first (epoch, step), the next training before the second, ...

    Yields the list of trained steps, in order. Epochs and steps count from 0.
    """
    trained: list[tuple[int, int]] = []
    left, train_step = list(places), Engine.train_step

    def crashing_step(engine: Engine, epoch: int, step: int, *rest: Any) -> Any:
        if left and (epoch, step) == left[0]:
            left.pop(0)
            raise RuntimeError("crash")
        result = train_step(engine, epoch, step, *rest)
        trained.append((epoch, step))
        return result

    Engine.train_step = crashing_step  # type: ignore[method-assign]
    try:
        yield trained
    finally:
        Engine.train_step = train_step  # type: ignore[method-assign]


def same_losses(one: Path, other: Path, rtol: float) -> None:
    """Check that both runs have the same epochs, losses within `rtol`, and trained every row once per epoch."""
    first, second = metrics(one), metrics(other)
    assert [epoch["epoch"] for epoch in first] == [epoch["epoch"] for epoch in second]
    for mine, others in zip(first, second, strict=True):
        np.testing.assert_allclose(list(mine["loss"].values()), list(others["loss"].values()), rtol=rtol)
        for epoch in (mine, others):
            ledger = epoch["ledger"]
            assert (ledger["trained"], ledger["duplicated"], ledger["lost"]) == (ledger["expected"], 0, 0)
        assert mine["ledger"] == others["ledger"]


def same_tensors(want: dict[str, torch.Tensor], got: dict[str, torch.Tensor], lr: float, steps: int) -> None:
    """Check that 99.9 % of each tensor's elements differ by at most 1e-4, and all by at most `lr` x `steps`."""
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        gap = (tensor.float() - got[name].float()).abs()
        assert (gap <= 1e-4).float().mean() >= 0.999, name
        assert gap.max() <= lr * steps, name
