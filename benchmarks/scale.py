"""LightGCN's propagation over growing graphs on two gloo workers of one thread: time, bytes sent and memory.

    python benchmarks/scale.py --out DIR [--sizes 500000:10000000 1000000:20000000 2000000:40000000] [--turns 5]

A size is nodes:interactions; three quarters of the nodes are users. The graphs are written to DIR as `distrec synth
graph` writes them, and are reused if they exist. Training interactions (about eight tenths) are the graph's edges. The
time is that of a training step's work on the graph, until the slower worker is done: three hops forward and three
backward, with 64 columns and all rows. Memory is a worker's peak with everything it has read, including tables and
their gradients, but not the moments of an optimizer.

At the end, the same graph is built once more with nodes numbered by degree within each worker's block, and the local
products of both graphs take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from exchange import METERED, WORKERS, sent_bytes
from turns import resident

from distrec.data.dataset import Dataset
from distrec.data.synth import GraphSize, write_graph
from distrec.graph.polynomial import mean_of_powers
from distrec.graph.user_item import UserItemGraph
from distrec.parallel.partition import Partition
from distrec.parallel.world import World
from distrec.runtime import quiet, tune_process

WIDTH, LAYERS, USERS = 64, 3, 0.75
LIMIT = 24 * 1024  # MB for all workers together


def graph_of(out: str, nodes: int, edges: int) -> str:
    """The folder of a random dataset of this size, written if it does not exist."""
    users = int(nodes * USERS)
    path = Path(out, f"graph-{nodes}-{edges}")
    if not (path / "manifest.json").exists():
        began = time.perf_counter()
        write_graph(str(path), GraphSize(users=users, items=nodes - users, edges=edges, dim=4, image_dim=4))
        print(f"  written in {time.perf_counter() - began:.0f} s", flush=True)
    return str(path)


def median(run: Callable[[], Any], turns: int) -> float:
    """Seconds of each run until every worker is done, without the first run."""
    spent = []
    for _ in range(turns + 1):
        dist.barrier()
        began = time.perf_counter()
        run()
        dist.barrier()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[1:])


def bytes_sent(run: Callable[[], Any]) -> int:
    """The bytes that this worker sends during `run`."""
    total, plain = 0, {name: getattr(World, name) for name in METERED}

    def counted(name: str) -> Callable[..., Any]:
        def call(world: World, *arguments: Any) -> Any:
            nonlocal total
            total += sent_bytes(name, world.rank, *arguments)
            return plain[name](world, *arguments)

        return call

    for name in METERED:
        setattr(World, name, counted(name))
    try:
        run()
    finally:
        for name, function in plain.items():
            setattr(World, name, function)
    return total


def by_degree(side: Partition, ids: np.ndarray) -> np.ndarray:
    """`ids` after the rows of each worker's block are renumbered, highest degree first."""
    degree, number = np.bincount(ids, minlength=side.total), np.empty(side.total, np.int32)
    for rank in range(side.size):
        start, stop = side.start(rank), side.stop(rank)
        number[start + np.argsort(-degree[start:stop], kind="stable")] = np.arange(start, stop)
    return number[ids]


def local_products(graphs: dict[str, UserItemGraph], turns: int) -> dict[str, list[float]]:
    """Seconds of both local products of each graph, in turns, on all workers at the same time."""
    spent: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(turns + 1):
        for name in list(graphs) if turn % 2 else list(graphs)[::-1]:
            matrix = graphs[name].matrix
            products = [(part, torch.randn(part.columns, WIDTH)) for part in (matrix._by_row, matrix._by_column)]
            dist.barrier()
            began = time.perf_counter()
            for part, x in products:
                part.matmul(x)
            spent[name].append(time.perf_counter() - began)
    return {name: times[1:] for name, times in spent.items()}


def measured(world: World, path: str, turns: int) -> dict[str, Any]:
    data = Dataset.open(path)
    users, items = Partition(data.users, world.size), Partition(data.items, world.size)
    train = data.interactions("train")
    user, item = train.user, train.item
    del train
    began = time.perf_counter()
    graph = UserItemGraph(world, users, items, user, item)
    out: dict[str, Any] = {"edges": len(user), "built": time.perf_counter() - began} | graph.record()
    out["peak after building"] = resident("VmHWM")
    torch.manual_seed(world.rank)
    tables = [torch.randn(side.count(world.rank), WIDTH, requires_grad=True) for side in (users, items)]
    grads = [torch.randn_like(table) for table in tables]
    weights = mean_of_powers(LAYERS)
    vectors: list[tuple[torch.Tensor, ...]] = [()]

    def forward() -> None:
        vectors[0] = graph.propagate(*tables, weights)

    def backward() -> None:
        for table in tables:
            table.grad = None
        torch.autograd.backward(vectors[0], grads, retain_graph=True)

    out["forward"] = median(forward, turns)
    out["backward"] = median(backward, turns)
    out["sent"] = bytes_sent(forward) + bytes_sent(backward)
    out["peak"] = resident("VmHWM")
    vectors.clear()
    ordered = UserItemGraph(world, users, items, by_degree(users, user), by_degree(items, item))
    out["local"] = local_products({"as drawn": graph, "by degree": ordered}, 3 * turns)
    return out


def worker(rank: int, store: str, path: str, turns: int, result: str) -> None:
    quiet()
    tune_process(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORKERS)
    everyone: list[Any] = [None] * WORKERS
    dist.all_gather_object(everyone, measured(World.current(), path, turns))
    if rank == 0:
        Path(result).write_text(json.dumps(everyone))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="a folder for the graphs, 0.5 GB for 40 million interactions")
    parser.add_argument("--sizes", nargs="+", default=["500000:10000000", "1000000:20000000", "2000000:40000000"])
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    for size in arguments.sizes:
        nodes, edges = map(int, size.split(":"))
        path = graph_of(arguments.out, nodes, edges)
        print(f"{nodes} nodes, {edges} interactions, load {os.getloadavg()[0]:.1f} before", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            store, result = str(Path(folder, "store")), str(Path(folder, "result"))
            torch.multiprocessing.spawn(worker, (store, path, arguments.turns, result), nprocs=WORKERS)
            workers = json.loads(Path(result).read_text())
        rows.append((nodes, workers))
        show(workers)
    table(rows)


def show(workers: list[dict[str, Any]]) -> None:
    first = workers[0]
    print(
        f"  {first['edges']} edges, built in {first['built']:.1f} s; {first['stays']} stay, exchange "
        f"{first['exchange']}: {first['rows_received_per_product']} rows received per product "
        f"({first['rows_received_if_gathered']} if gathered; by the side that stays "
        f"{first['rows_received_if_it_stayed']})"
    )
    for rank, mine in enumerate(workers):
        drawn, ordered = mine["local"]["as drawn"], mine["local"]["by degree"]
        ratio = statistics.median(b / a for a, b in zip(drawn, ordered, strict=True))
        print(
            f"  worker {rank}: peak {mine['peak']:.0f} MB ({mine['peak after building']:.0f} after building); local "
            f"products of a hop {1000 * statistics.median(drawn):.1f} ms, numbered by degree {ratio:.3f} of that"
        )
    whole = sum(mine["peak"] for mine in workers)
    print(f"  all workers {whole:.0f} MB{'' if whole < LIMIT else f', MORE than {LIMIT}'}", flush=True)


def table(rows: list[tuple[int, list[dict[str, Any]]]]) -> None:
    """Print all sizes in a table; in brackets, growth since the previous size divided by the growth of the edges."""
    columns = ("forward s", "backward s", "sent MB", "peak MB")
    print(f"{'nodes':>9} {'edges':>10} " + " ".join(f"{name:>20}" for name in columns) + "  exchange")
    before: list[float] = []
    for nodes, workers in rows:
        values = [
            max(mine[key] for mine in workers) / unit
            for key, unit in (("forward", 1), ("backward", 1), ("sent", 1e6), ("peak", 1))
        ]
        edges = workers[0]["edges"]
        growth = [value / old / (edges / before[-1]) for value, old in zip(values, before)] if before else []
        shown = [f"{value:.2f}" if unit < 2 else f"{value:.0f}" for unit, value in enumerate(values)]
        shown = [f"{text} (x {g:.2f})" for text, g in zip(shown, growth)] if growth else shown
        print(f"{nodes:>9} {edges:>10} " + " ".join(f"{text:>20}" for text in shown) + f"  {workers[0]['exchange']}")
        before = [*values, edges]


if __name__ == "__main__":
    main()
