"""The k nearest items by cosine: ours against a plain blocked program, each in its own process.

    python benchmarks/knn.py [--items 200000] [--width 384] [--k 10] [--threads 2] [--turns 1]

Items are random vectors in clusters. The plain program multiplies 1,024 rows at a time by all items and takes
`torch.topk` of that block (0.8 GB at 200,000 items); its rows are whole, so nothing needs merging. A sample of our rows
is compared with cosines in float64, and all our rows are compared with the plain program's as sets. Neighbours may
differ only if their cosines agree within `TIE`, the rounding error of a float32 product.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from turns import answer, resident

from distrec.graph.knn import cosine_neighbours
from distrec.parallel.partition import Partition
from distrec.parallel.world import World
from distrec.runtime import tune_process
from distrec.tables.features import unit_rows

ROWS, SAMPLE, TIE, LIMIT = 1024, 500, 2e-6, 2048
CLUSTER_ITEMS = 50
PROGRAMS = ("distrec", "plain")


def drawn(items: int, width: int) -> torch.Tensor:
    """Unit rows `[items, width]`, each a cluster's centre plus noise."""
    generator = torch.Generator().manual_seed(0)
    clusters = max(2, items // CLUSTER_ITEMS)
    rows = torch.randn(items, width, generator=generator)
    rows += torch.randn(clusters, width, generator=generator)[torch.randint(clusters, (items,), generator=generator)]
    return unit_rows(rows)


def plain(vectors: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    best = [(rows @ vectors.t()).topk(k) for rows in vectors.split(ROWS)]
    return torch.cat([part.values for part in best]), torch.cat([part.indices for part in best])


def serve(pipe: Connection, program: str, path: str, k: int, threads: int) -> None:
    """A program's process: read the vectors from a file, run on request, and send seconds and results."""
    if program == "distrec":
        tune_process(threads)
    torch.set_num_threads(threads)
    imported = resident("VmRSS")
    vectors = torch.from_numpy(np.load(path))
    partition = Partition(len(vectors), 1)
    for _ in iter(pipe.recv, None):
        began = time.perf_counter()
        if program == "distrec":
            cosines, items = cosine_neighbours(World(0, 1), partition, vectors, k)
        else:
            cosines, items = plain(vectors, k)
        spent, peak = time.perf_counter() - began, resident("VmHWM")
        np.savez(f"{path}.{program}.npz", cosines=cosines.numpy(), items=items.numpy())
        pipe.send((spent, peak - imported))


def check_sample(vectors: np.ndarray, cosines: np.ndarray, items: np.ndarray) -> int:
    """The number of sampled rows whose neighbours are those by float64 cosines, in order; other rows must be ties."""
    k, exact = items.shape[1], 0
    rows = np.sort(np.random.default_rng(1).choice(len(vectors), min(SAMPLE, len(vectors)), replace=False))
    everyone = vectors.astype(np.float64)
    for row in rows:
        true = everyone @ everyone[row]
        best = np.argsort(-true, kind="stable")[:k]
        exact += int((best == items[row]).all())
        worst = max(np.abs(true[items[row]] - true[best]).max(), np.abs(true[items[row]] - cosines[row]).max())
        if worst > TIE or len(set(items[row].tolist())) != k:
            sys.exit(f"row {row}: neighbours {items[row]} are not the nearest, {best}")
    return exact


def check_whole(ours: dict[str, np.ndarray], its: dict[str, np.ndarray]) -> int:
    """The number of rows with the same set of neighbours in both results; other rows' sorted cosines must agree."""
    same = (np.sort(ours["items"], 1) == np.sort(its["items"], 1)).all(1)
    worst = np.abs(ours["cosines"] - its["cosines"]).max()
    if worst > TIE:
        sys.exit(f"cosines of the two programs differ by {worst:.1e}")
    return int(same.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=1)
    arguments = parser.parse_args()
    os.environ["OMP_PROC_BIND"] = "true"
    context, processes, pipes = get_context("spawn"), [], {}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "vectors.npy"))
        vectors = drawn(arguments.items, arguments.width).numpy()
        np.save(path, vectors)
        print(
            f"{arguments.items} items, {arguments.width} wide, k {arguments.k}, {arguments.threads} threads, load "
            f"{os.getloadavg()[0]:.1f} before",
            flush=True,
        )
        try:
            for program in PROGRAMS:
                pipes[program], end = context.Pipe()
                given = (end, program, path, arguments.k, arguments.threads)
                processes.append(context.Process(target=serve, args=given, daemon=True))
                processes[-1].start()
                end.close()
            turns = []
            for _ in range(arguments.turns):
                turns.append({})
                for program, pipe in pipes.items():
                    pipe.send(True)
                    turns[-1][program] = answer(pipe)
        finally:
            for process in processes:
                process.kill()
                process.join()
        results = {program: dict(np.load(f"{path}.{program}.npz")) for program in PROGRAMS}
    products = 2 * arguments.items**2 * arguments.width
    for program in PROGRAMS:
        seconds = statistics.median(turn[program][0] for turn in turns)
        ratio = statistics.median(turn[program][0] / turn["distrec"][0] for turn in turns)
        peak = max(turn[program][1] for turn in turns)
        print(
            f"  {program:10} {seconds:8.1f} s ({products / seconds / 1e9:.1f} GFLOP/s)  {ratio:5.2f} x  "
            f"peak {peak:.0f} MB beyond imports, including {vectors.nbytes / 2**20:.0f} for the vectors"
        )
    exact = check_sample(vectors, **results["distrec"])
    print(
        f"  {exact} of {min(SAMPLE, arguments.items)} sampled rows are exactly as in float64; "
        f"the others differ only in ties of {TIE:.0e}"
    )
    same = check_whole(results["distrec"], results["plain"])
    print(
        f"  {same} of {arguments.items} rows have the plain program's neighbours; the others differ only in such ties"
    )
    if max(turn["distrec"][1] for turn in turns) > LIMIT:
        sys.exit(f"ours took more than {LIMIT} MB")


if __name__ == "__main__":
    main()
