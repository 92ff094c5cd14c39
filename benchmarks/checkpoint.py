"""Time to save, verify and load a checkpoint, beside PyTorch's distributed checkpoint of the same tensors.

    python benchmarks/checkpoint.py --rows 1000000 --dim 64

One process holds a table with two Adam moments. Each time is the best of three; files are written to disk (fsync) by
both, and read from the page cache by both.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from distrec.data.storage import open_folder
from distrec.parallel.partition import Partition
from distrec.parallel.world import World
from distrec.tables.sharded import by_global_row
from distrec.training.checkpoint import Checkpoints


def best(action: Callable[[], object], times: int = 3) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        dist.init_process_group("gloo", init_method=f"file://{name}/store", rank=0, world_size=1)
        world, partition = World.current(), Partition(arguments.rows, 1)
        tensors: dict[str, torch.Tensor] = {
            kind: by_global_row(world, torch.rand(arguments.rows, arguments.dim), partition)
            for kind in ("weight", "exp_avg", "exp_avg_sq")
        }
        gigabytes = sum(value.numel() * 4 for value in tensors.values()) / 1e9
        empty = {key: by_global_row(world, torch.zeros(value.shape), partition) for key, value in tensors.items()}
        theirs = Path(name, "torch")

        def own() -> Checkpoints:
            """New each time, since an object remembers what it has verified."""
            return Checkpoints(open_folder(f"{name}/own"), world)

        rows = {
            "save": (lambda: own().save("c", tensors, {}), lambda: dcp.save(tensors, checkpoint_id=theirs)),
            "verify": (lambda: own().defect("c"), None),
            "load (verifies too)": (
                lambda: own().load("c", empty),
                lambda: dcp.load(dict(empty), checkpoint_id=theirs),
            ),
        }
        print(f"{gigabytes:.2f} GB\n\n| step | here, s | PyTorch's, s | ratio |\n| --- | --- | --- | --- |")
        for step, (here, there) in rows.items():
            mine, other = best(here), best(there) if there else None
            print(f"| {step} | {mine:.2f} | " + (f"{other:.2f} | {mine / other:.2f} |" if other else "| |"))
        for key, value in tensors.items():
            loaded = empty[key]
            assert isinstance(loaded, DTensor)
            assert isinstance(value, DTensor)
            assert torch.equal(loaded.to_local(), value.to_local())
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
