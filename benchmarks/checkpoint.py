"""Time to save, verify and load a checkpoint, and the time for which a save stops training.

    python benchmarks/checkpoint.py --rows 1000000 --dim 64

One process holds a table with two Adam moments. First table: saving, verifying and loading on the local disk beside
PyTorch's distributed checkpoint of the same tensors. Each time is the best of three; files are written to disk (fsync)
by both, and read from the page cache by both.

Second table: how long `Saver.save` keeps a training loop from its next step, written before it returns or in the
background, on the local disk and on a store that speaks the S3 protocol (moto's server on this machine: a mock, which
shares its cores with training). Beside it, the time until the checkpoint is complete, and the steps made meanwhile: a
matrix product on one thread, as long as a small training step, whose median is given without and with a save in flight.
The kinds take turns in one process; medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from distrec.data.storage import open_folder
from distrec.parallel.partition import Partition
from distrec.parallel.world import World
from distrec.tables.sharded import by_global_row
from distrec.training.checkpoint import Checkpoints
from distrec.training.run_folder import RunFolder, checkpoint_name
from distrec.training.saving import Saver


def best(action: Callable[[], object], times: int = 3) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


@contextmanager
def s3() -> Iterator[str]:
    """A bucket of a moto server."""
    import s3fs

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    os.environ.update(
        AWS_ENDPOINT_URL=url, AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1"
    )
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(url, timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        s3fs.S3FileSystem().mkdir("benchmark")
        yield "s3://benchmark"
    finally:
        server.kill()
        server.wait(10)


class NoRecord(RunFolder):
    """A run folder without `run.json`."""

    def update_record(self, **fields: Any) -> None:
        pass


def stops(storage: str, tensors: dict[str, torch.Tensor], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of `save`, until the checkpoint is complete, and of steps without and with a save in flight, by kind."""
    left, right = torch.rand(512, 512), torch.rand(512, 512)
    folder = NoRecord(open_folder(storage))

    def step() -> float:
        started = time.perf_counter()
        torch.mm(left, right)
        return time.perf_counter() - started

    out: dict[str, dict[str, list[float]]] = {}
    world = World.current()
    for number in range(rounds):
        for kind in ("before `save` returns", "in the background"):
            saver = Saver(Checkpoints(folder.checkpoints, world), folder, lambda: None)
            saver.at_once = kind != "in the background"
            found = out.setdefault(kind, {"stop": [], "complete": [], "alone": [], "beside": []})
            found["alone"] += [step() for _ in range(50)]
            done: list[float] = []
            name, started = checkpoint_name(number, 0), time.perf_counter()
            saver.save(name, tensors, {}, {name}, started, done.append)
            found["stop"].append(time.perf_counter() - started)
            while not done:
                found["beside"].append(step())
            found["complete"].append(time.perf_counter() - started)
            saver.wait()
            Checkpoints(folder.checkpoints, world).keep_only(set())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, s3() as bucket:
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
        print("\n| storage | written | training stops, s | complete after, s | step alone, ms | step beside, ms |")
        print("| --- | --- | --- | --- | --- | --- |")
        for storage, path in (("local disk", f"{name}/run"), ("S3 (moto)", f"{bucket}/run")):
            for kind, found in stops(path, tensors, arguments.rounds).items():
                stop, complete = (statistics.median(found[key]) for key in ("stop", "complete"))
                alone, beside = (1e3 * statistics.median(found[key] or [0.0]) for key in ("alone", "beside"))
                shown = f"{beside:.2f}" if found["beside"] else ""
                print(f"| {storage} | {kind} | {stop:.2f} | {complete:.2f} | {alone:.2f} | {shown} |")
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
