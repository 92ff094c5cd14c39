"""Check that two checkouts of the repository train bit-identically, for a change that must not change any result.

    python benchmarks/same_losses.py OLD NEW [--workers 2]

Each checkout trains every method and variant in `tests/methods/small` that it has for a few steps on a small random
dataset. The script compares the loss terms of each step, and at the end all tables, dense weights, moments and ranking
vectors. It exits with status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

STEPS, BATCH = 12, 64  # more steps than an epoch has, so that they include a short batch


def cases() -> dict[str, Any]:
    """Sections of a run config, by the case's name in the printed lines."""
    from tests.methods import beside

    methods = beside.cases()
    out: dict[str, Any] = {name: {"method": settings} for name, settings in methods.items()}
    out["bprmf, sparse tables"] = {"method": methods["bprmf"], "optimizer": {"tables": "sparse"}}
    out["bprmf, 3 micro-batches"] = {"method": methods["bprmf"], "train": {"accumulate": 3}}
    for stage in (1, 2, 3):
        for precision in ("fp32", "bf16"):
            out[f"alignrec, clipped, ZeRO {stage}, {precision}"] = {
                "method": methods["alignrec"],
                "optimizer": {"clip_norm": 0.1},
                "dense": {"zero_stage": stage, "precision": precision},
            }
    return out


def train(folder: Path, checkout: Path) -> None:
    """Train all cases as one worker; rank 0 writes the results to compare."""
    from distrec.runtime import quiet

    quiet()
    import distrec
    from distrec.config import RunConfig, decode
    from distrec.data.dataset import Dataset
    from distrec.methods.registry import METHODS, resolve
    from distrec.parallel.world import World
    from distrec.training.engine import Engine

    assert checkout in Path(str(distrec.__file__)).parents, f"distrec is imported from {distrec.__file__}"
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    world, data = World.current(), str(folder / "data")
    out: dict[str, Any] = {}
    for case, sections in json.loads((folder / "cases.json").read_text()).items():
        if sections["method"]["name"] not in METHODS:  # which the other checkout adds
            continue
        tree = {"data": data, "run": {"name": "run"}, **sections}
        tree["train"] = {"global_batch": BATCH, **tree.get("train", {})}
        engine = Engine(world, Dataset.open(data), resolve(decode(RunConfig, tree)))
        engine.set_lr(1e-2)
        results: dict[str, Any] = {}
        for number in range(STEPS if engine.method.trainable else 0):
            epoch, step = divmod(number, engine.steps_per_epoch)
            results[f"losses of step {number}"] = engine.train_step(epoch, step, engine.samples(epoch, step))[0]
        for name, value in engine.state().items():
            results[name] = (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        final = engine.representations()
        out[case] = results | {"user vectors": final.users.clone(), "item vectors": final.items.clone()}
    if world.rank == 0:
        torch.save(out, folder / "trained.pt")
    dist.barrier()
    os._exit(0)  # threads that DeepSpeed's process groups leave behind can make a normal exit fail


def trained(folder: Path, checkout: Path, workers: int) -> dict[str, Any]:
    """The results that `train` writes from `checkout`."""
    shared = {"WORLD_SIZE": str(workers), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, checkout, checkout, "--train", folder],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(workers)
    ]
    failed = any([process.wait() for process in processes])
    (folder / "store").unlink(missing_ok=True)
    if failed:
        raise SystemExit(f"training from {checkout} failed")
    return dict(torch.load(folder / "trained.pt"))


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", type=lambda path: Path(path).resolve(), nargs=2, metavar=("OLD", "NEW"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.train, arguments.checkouts[0])
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.training.random_data import write_random

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random(folder / "data", 61, 37, 500, 0)
        (folder / "cases.json").write_text(json.dumps(cases()))
        old, new = (trained(folder, checkout, arguments.workers) for checkout in arguments.checkouts)
    different = {}
    for case in [case for case in old if case in new]:
        both, either = old[case].keys() & new[case].keys(), old[case].keys() | new[case].keys()
        different[case] = sorted(
            (either - both) | {name for name in both if not same(old[case][name], new[case][name])}
        )
        answer = f"different: {', '.join(different[case])}" if different[case] else "bit-identical"
        print(f"{case:32} {len(either):3} values {answer}")
    raise SystemExit(any(different.values()))


if __name__ == "__main__":
    main()
