"""A method without an engine, with tables as plain tensors and a plain dense module; and datasets from given arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from distrec.config import RunConfig, decode
from distrec.data.dataset import Dataset, vector_table, write_part
from distrec.data.histories import Histories
from distrec.data.manifest import SPLITS, FeatureEntry, Manifest, write_manifest
from distrec.data.storage import open_folder
from distrec.data.synth import write_ids
from distrec.methods.base import Method, Representations
from distrec.methods.batch import Lookup, Step, batch_of
from distrec.methods.registry import build_method, resolve
from distrec.methods.workspace import Workspace
from distrec.parallel.partition import Partition
from distrec.parallel.world import World

SEED = 3


def run_config(method: dict[str, Any], **sections: Any) -> RunConfig:
    return resolve(decode(RunConfig, {"data": "d", "run": {"name": "r"}, "method": method, **sections}))


def write(
    folder: Path,
    users: int,
    items: int,
    train: Sequence[tuple[int, int]],
    features: Mapping[str, np.ndarray],
    held_out: Sequence[tuple[int, int]] = ((0, 0),),
    tokens: Mapping[str, np.ndarray] | None = None,
) -> str:
    """A prepared dataset of given training pairs, features `[items, width]` and token sets `[items, tokens, width]`.

    A row of NaN is a missing feature, or a token that an item lacks.
    """
    root = open_folder(str(folder))
    files, entries, counts = write_ids(root, users, items), {}, {}
    for split in SPLITS:
        user, item = np.array(sorted(train if split == "train" else held_out), np.int32).reshape(-1, 2).T
        name = f"interactions/{split}/part-00000.parquet"
        time = 1000 * (split != "train") + np.arange(len(user), dtype=np.int64)  # the held-out items are the newest
        table = pa.table({"user": user, "item": item, "timestamp": time})
        files[name], counts[split] = write_part(root, name, table), len(user)
    for name, values in features.items():
        missing, part = np.isnan(values).any(1), f"features/{name}/part-00000.parquet"
        filled = np.where(missing[:, None], 0, values).astype(np.float32)
        files[part] = write_part(root, part, vector_table(0, filled, missing))
        entries[name] = FeatureEntry(
            width=values.shape[1], dtype="float32", missing=int(missing.sum()), source="made", parts=[part]
        )
    for name, values in (tokens or {}).items():
        count, part = (~np.isnan(values).any(2)).sum(1), f"features/{name}/part-00000.parquet"
        filled = np.nan_to_num(values).astype(np.float16).reshape(items, -1)
        files[part] = write_part(root, part, vector_table(0, filled, count == 0, count.astype(np.int32)))
        entries[name] = FeatureEntry(
            tokens=values.shape[1], width=values.shape[2], dtype="float16", missing=int((count == 0).sum()),
            source="made", parts=[part],
        )  # fmt: skip
    manifest = Manifest(
        format=1, name="made", users=users, items=items, interactions=counts, split="given", id_order="given",
        features=entries, content={}, config={}, files=files,
    )  # fmt: skip
    write_manifest(root, manifest)
    return str(folder)


class Bare:
    """A built method on this rank's blocks; `tables` and `dense` hold leaves of autograd by name."""

    def __init__(self, world: World, data: Dataset, method: dict[str, Any]):
        self.world, self.train = world, data.interactions("train")
        self.method: Any = build_method(run_config(method), data)
        self.method.build(space := Workspace(world, data, self.train))
        self.users, self.items = space.users, space.items
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self.net: Any = self.method.dense()
        self.dense = {} if self.net is None else dict(self.net.named_parameters())
        self.tables = {}
        for table in self.method.tables():
            part = space.partitions[table.side]
            first, stop = part.start(world.rank), part.stop(world.rank)
            if table.start is None:
                rows = torch.from_numpy(table.init(("table", table.name, SEED), part.total, table.dim, first, stop))
            else:
                rows = table.start()
            self.tables[table.name] = rows.clone().requires_grad_()
        self.method.attach(self.tables.__getitem__, self._rows, self.net)

    def _rows(self, table: str, *lookups: Lookup) -> list[torch.Tensor]:
        return [lookup.rows(self.tables[table])[0] for lookup in lookups]

    def samples(self, size: int, epoch: int = 0, step: int = 0) -> Any:
        return self.method.sampler(self.train, SEED).batch(epoch, step, size)

    def batch(self, size: int = 32, epoch: int = 0, step: int = 0) -> Any:
        samples = self.samples(size, epoch, step)
        at = Step(SEED, epoch, step, len(samples.users), size)
        return batch_of(self.world, self.users, self.items, samples, at)

    def final(self) -> Representations:
        """The representations that rank the validation split."""
        final: Representations = self.method.representations(Histories([self.train], self.users.total))
        return final

    def gradients(self, term: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """The gradient of my share of a term for each table and dense parameter; None if it does not depend on one."""
        leaves = self.tables | self.dense
        if not term.requires_grad:
            return dict.fromkeys(leaves)
        grads = torch.autograd.grad(term, list(leaves.values()), retain_graph=True, allow_unused=True)
        return dict(zip(leaves, grads, strict=True))

    def whole(self, block: torch.Tensor, partition: Partition) -> torch.Tensor:
        """The rows of all ranks, `[rows, width]`."""
        return self.world.gather_blocks(block.detach().contiguous(), partition).clone()


def method_of(data: Dataset, **settings: Any) -> Method:
    """A method that has been checked against `data`, but not built."""
    return build_method(run_config(settings), data)
