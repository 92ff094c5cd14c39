"""Training steps of ODMT against a plain single-process program, and the gain from each saving.

    python benchmarks/odmt_step.py [--dims 256 768] [--threads 1] [--turns 5] [--users 32]

The dataset is random: histories over 2,000 items whose popularity falls as 1 / (rank + 10), with 30 text and 50 image
tokens of width 768 per item. Windows have 12 inputs and a target. Dropout is 0, so that losses can be compared. "plain"
encodes every slot of a batch and computes all positions of the last IMT block. Two more plain programs have one of the
project's savings each, and a third has both. "recomputing" is the project with `dense.activation_checkpointing`. Each
program has its own process. Their losses are compared, then they take turns (see turns.py).

The script also prints the floating-point operations of the matrix products in one of the project's steps, counted from
shapes. It compares our operations per second with those of a product of two dense 4,096 x 4,096 matrices.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import plain_odmt
import pyarrow as pa
from graph_step import square_product
from turns import OURS_IMPORTS, Ours, Program, Start, finish, report, running, turn

from distrec.config import decode
from distrec.config.run import RunConfig
from distrec.data.dataset import Dataset, group_rows, vector_table, write_part
from distrec.data.manifest import SPLITS, FeatureEntry, Manifest, write_manifest
from distrec.data.storage import open_folder
from distrec.data.synth import write_ids
from distrec.methods.registry import resolve

USERS, ITEMS, LENGTH, TEXT, IMAGE, WIDTH = 512, 2000, 12, 30, 50, 768
COMPARED = 2


def write(path: Path) -> None:
    """Write the random dataset; every user has more items than a window holds."""
    draw, folder = np.random.default_rng(0), open_folder(str(path))
    popularity = 1 / (np.arange(ITEMS) + 10)
    popularity /= popularity.sum()
    files, features, counts = write_ids(folder, USERS, ITEMS), {}, {}
    for split in SPLITS:
        user = np.repeat(np.arange(USERS, dtype=np.int32), LENGTH + 8 if split == "train" else 1)
        item = draw.choice(ITEMS, len(user), p=popularity).astype(np.int32)
        name = f"interactions/{split}/part-00000.parquet"
        table = pa.table({"user": user, "item": item, "timestamp": np.arange(len(user), dtype=np.int64)})
        files[name], counts[split] = write_part(folder, name, table), len(user)
    for name, tokens in {"text-tokens": TEXT, "image-tokens": IMAGE}.items():
        real = draw.integers(5, TEXT + 1, ITEMS) if name == "text-tokens" else np.full(ITEMS, IMAGE)
        values = draw.standard_normal((ITEMS, tokens, WIDTH), np.float32).astype(np.float16)
        values[np.arange(tokens) >= real[:, None]] = 0
        part = f"features/{name}/part-00000.parquet"
        table = vector_table(0, values.reshape(ITEMS, -1), np.zeros(ITEMS, bool), real.astype(np.int32))
        files[part] = write_part(folder, part, table, group_rows(2 * tokens * WIDTH))
        features[name] = FeatureEntry(
            tokens=tokens, width=WIDTH, dtype="float16", missing=0, source="drawn", parts=[part]
        )
    manifest = Manifest(
        format=1, name="drawn", users=USERS, items=ITEMS, interactions=counts, split="given", id_order="given",
        features=features, content={}, config={}, files=files,
    )  # fmt: skip
    write_manifest(folder, manifest)


def config(path: str, dim: int, users: int, recomputing: bool = False) -> RunConfig:
    tree = {
        "data": path,
        "run": {"name": "benchmark"},
        "method": {"name": "odmt", "dim": dim, "dropout": 0.0, "length": LENGTH},
        "train": {"global_batch": users},
        "optimizer": {"name": "adamw", "lr": 1e-4, "weight_decay": 0.1, "clip_norm": 5.0},
        "dense": {"activation_checkpointing": recomputing},
    }
    return resolve(decode(RunConfig, tree))


class WindowOurs(Ours):
    """The project's engine with batches of windows."""

    def epoch(self) -> Iterator[Any]:
        for step in range(self.engine.steps_per_epoch):
            windows = self.engine.samples(0, step)
            yield windows.users, windows.items, windows.rows

    def step(self, users: np.ndarray, windows: np.ndarray, rows: np.ndarray) -> float:
        from distrec.data.sampling import Windows

        terms, _ = self.engine.train_step(0, self.steps, Windows(users, windows, rows))
        self.steps += 1
        return sum(terms.values())


def ours(path: str, dim: int, users: int, recomputing: bool, start: Start | None) -> Ours:
    return WindowOurs(path, config(path, dim, users, recomputing))


def plainly(path: str, dim: int, users: int, distinct: bool, read_out: bool, start: Start) -> plain_odmt.Odmt:
    return plain_odmt.Odmt(Dataset.open(path), start.weights, config(path, dim, users), distinct, read_out)


def programs(path: str, dim: int, users: int) -> list[Program]:
    where = path, dim, users
    plains = {
        "plain": (False, False),
        "plain, distinct": (True, False),
        "plain, read rows": (False, True),
        "plain, both": (True, True),
    }
    return [
        Program("distrec", partial(ours, *where, False), OURS_IMPORTS, tuned=True),
        Program("distrec, recomputing", partial(ours, *where, True), OURS_IMPORTS, tuned=True),
        *(Program(name, partial(plainly, *where, *flags)) for name, flags in plains.items()),
    ]


def operations(dim: int, users: int, distinct: float, method: dict[str, Any]) -> dict[str, float]:
    """The floating-point operations of one step's matrix products, by kind: forward, and twice as many backward."""
    tokens, layers, slots = TEXT + IMAGE + 1, method["merged_att_layers"], users * LENGTH
    # Frozen tokens need no gradient, so their projections take one product backward instead of two.
    project = distinct * 2 * dim * WIDTH * (2 * (TEXT + IMAGE) + 3)
    whole = tokens * 24 * dim**2 + 4 * tokens**2 * dim
    read = tokens * 4 * dim**2 + 3 * 20 * dim**2 + 4 * 3 * tokens * dim
    encoder = slots * 24 * dim**2 + 4 * slots * LENGTH * dim
    return {
        "projections": project,
        "IMT": 3 * distinct * ((layers - 1) * whole + read),
        "nets": 3 * distinct * 3 * 4 * dim**2,
        "user encoders": 3 * 3 * method["user_layers"] * encoder,
        "scores": 4 * 3 * slots * distinct * 2 * dim,  # computed once more for the backward pass
    }


def compare(path: str, dim: int, users: int, threads: list[int], turns: int) -> None:
    print(f"odmt: dim {dim}, {users} users of {LENGTH} inputs, {TEXT} + {IMAGE} tokens, {WIDTH} wide")
    with running(programs(path, dim, users), COMPARED, 1e-5) as (start, pipes):
        distinct = float(np.mean([len(np.unique(windows[windows >= 0])) for _, windows, _ in start.batches]))
        counted = operations(dim, users, distinct, config(path, dim, users).method)
        shown = ", ".join(f"{kind} {count / 1e9:.1f}" for kind, count in counted.items())
        print(f"  {distinct:.0f} distinct items in {users * (LENGTH + 1)} slots; GFLOP of a step's products: {shown}")
        for count in threads:
            large = square_product(count)
            print(f"  {count} thread{'s' * (count > 1)}, load {os.getloadavg()[0]:.1f} before", flush=True)
            spent = [turn(pipes, count, 1, sampling=False) for _ in range(turns)]
            seconds = report(spent, 1, "a step")
            rate = sum(counted.values()) / seconds
            print(f"    {rate / 1e9:.1f} GFLOP/s in ours, {large / 1e9:.1f} in a large product ({rate / large:.2f})")
        finish(pipes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 768])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--turns", type=int, default=5, help="turns of each program")
    parser.add_argument("--users", type=int, default=32, help="users in a batch")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as path:
        write(Path(path))
        for dim in arguments.dims:
            compare(path, dim, arguments.users, arguments.threads, arguments.turns)


if __name__ == "__main__":
    main()
