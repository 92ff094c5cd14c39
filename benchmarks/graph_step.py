"""Steps of STAIR and MENTOR on Amazon Baby's graph against plain single-process programs.

    python benchmarks/graph_step.py --data DIR [--threads 1 2] [--turns 7] [--cases stair mentor-0 mentor]

DIR is the prepared dataset `baby`, which gets random features in clusters: text and image of 384 and 512 columns for
STAIR, of 384 and 4,096 for MENTOR. MENTOR runs without contrast (`mask_weight_g` 0, three towers) and with it (1e-3,
seven towers). Its published program computes all seven towers and both square matrices in either case. "plain" does
only the work that the weight requires, and "all towers" does what the published program does. Each program has its own
process. Their losses are compared, then they take turns (see turns.py).

The script also prints the floating-point operations of a step, counted from shapes: a product of [m, k] and [k, n]
counts 2 m k n, a sparse product counts 2 x entries x width, and element-wise work is not counted. It compares our
operations per second with those of a product of two dense 4,096 x 4,096 matrices.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import plain
import plain_graph
import torch
from training_step import run_config, with_features
from turns import OURS_IMPORTS, Ours, Program, Start, finish, report, running, turn

from distrec.config.run import RunConfig
from distrec.data.dataset import Dataset

CLUSTERS = 140  # some 50 items each
SQUARE = 4096
FEATURES = {"stair": {"text": 384, "image": 512}, "mentor": {"text": 384, "image": 4096}}


@dataclass(frozen=True)
class Case:
    """A method with its settings.

    Attributes:
        compared: the number of steps whose losses must agree within `tolerance`.
        portion: the number of steps in a turn.
        contrast: the value of `mask_weight_g`.
    """

    method: str
    batch: int
    compared: int
    tolerance: float
    portion: int
    lr: float
    contrast: float = 0.0

    def config(self, path: str) -> RunConfig:
        """The published settings for Baby."""
        train: dict[str, Any] = {"global_batch": self.batch}
        if self.method == "stair":
            settings: dict[str, Any] = {"gamma": 0.1}
            optimizer: dict[str, Any] = {"name": "adamw", "lr": self.lr, "weight_decay": 0.3}
        else:
            settings = {"mask_weight_g": self.contrast}
            optimizer = {"lr": self.lr}
        return run_config(path, self.method, settings, train=train, optimizer=optimizer)

    def programs(self, path: str) -> list[Program]:
        first = Program("distrec", partial(ours, path, self), OURS_IMPORTS, tuned=True)
        same = partial(plainly, path, self, False)
        others = [Program("plain", same), Program("plain, tuned memory", same, tuned=True)]
        if self.method == "mentor" and not self.contrast:
            others.append(Program("plain, all towers", partial(plainly, path, self, True)))
        return [first, *others]


CASES = {
    "stair": Case("stair", 1024, compared=10, tolerance=1e-5, portion=20, lr=1e-3),
    "mentor-0": Case("mentor", 2048, compared=3, tolerance=1e-4, portion=2, lr=1e-4),
    "mentor": Case("mentor", 2048, compared=3, tolerance=1e-4, portion=1, lr=1e-4, contrast=1e-3),
}


class GraphOurs(Ours):
    """An engine whose start also holds what the plain programs need beyond tables and dense weights."""

    def start(self, compared: int) -> Start:
        start = super().start(compared)
        layer = getattr(self.engine.method, "mask_layer", None)
        if layer is not None:
            start.weights.update({f"mask.{name}": x.detach().numpy().copy() for name, x in layer.named_parameters()})
        return start


def ours(path: str, case: Case, start: Start | None) -> Ours:
    return GraphOurs(path, case.config(path))


def plainly(path: str, case: Case, everything: bool, start: Start) -> plain.Program:
    data = Dataset.open(path)
    if case.method == "stair":
        return plain_graph.Stair(data, start.weights, case.batch, case.lr)
    return plain_graph.Mentor(
        data, start.weights, case.batch, case.lr, case.contrast, everything=everything, repeated=case.compared
    )


def operations(case: Case, data: Dataset, entries: dict[str, int], dim: int = 64) -> dict[str, float]:
    """The floating-point operations of the matrix products in one of the project's steps, by kind."""
    users, items, user_item, item_item = data.users, data.items, entries["user_item"], entries["item_item"]
    if case.method == "stair":
        hop = 2 * 2 * user_item * dim  # both directions of the edges
        return {"sparse": 3 * 2 * hop + 3 * 2 * item_item * dim}
    widths = {"v": data.feature("image").width, "t": data.feature("text").width, "id": dim}
    towers = ["v", "t", "id"] + (["v", "t"] * 2 if case.contrast else [])
    # A layer takes one product forward, one for its weights' gradient, and one for its input's gradient unless the
    # input is a feature.
    first = sum(2 * items * widths[tower] * 256 * (3 if tower == "id" else 2) for tower in towers)
    second = len(towers) * 3 * 2 * items * 256 * dim
    mask = 2 * (users + items) * (2 * dim) ** 2
    hops = len(towers) * dim * 2 * (2 * 2 * 2 * user_item + 2 * item_item)
    out = {"sparse": hops, "dense": first + second + mask}
    if case.contrast:
        out["contrast"] = 3 * 2 * (users**2 + items**2) * 2 * dim
    return out


def square_product(threads: int, rounds: int = 3) -> float:
    """Operations per second of a large dense product, the best of several runs."""
    torch.set_num_threads(threads)
    left, right = torch.randn(SQUARE, SQUARE), torch.randn(SQUARE, SQUARE)
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - began)
    return 2 * SQUARE**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the prepared dataset baby")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=7, help="turns of each program")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    arguments = parser.parse_args()
    for name in arguments.cases:
        case = CASES[name]
        with with_features(arguments.data, FEATURES[case.method], CLUSTERS) as path:
            compare(name, case, path, arguments.threads, arguments.turns)


def compare(name: str, case: Case, path: str, threads: list[int], turns: int) -> None:
    data = Dataset.open(path)
    pairs = data.manifest.interactions["train"]
    print(f"{name}: {data.users} users, {data.items} items, {pairs} pairs, batches of {case.batch}")
    with running(case.programs(path), case.compared, case.tolerance) as (start, pipes):
        counted = operations(case, data, start.entries)
        shown = ", ".join(f"{kind} {count / 1e9:.2f}" for kind, count in counted.items())
        print(f"  GFLOP of a step's products: {shown}; entries of the graphs {start.entries}")
        for count in threads:
            plural = "s" * (count > 1)
            large = square_product(count)
            print(f"  {count} thread{plural}, load {os.getloadavg()[0]:.1f} before", flush=True)
            turn(pipes, count, 1, sampling=False)  # warms up
            spent = [turn(pipes, count, case.portion, sampling=False) for _ in range(turns)]
            seconds = report(spent, case.portion, "a step")
            rate = sum(counted.values()) / seconds
            print(
                f"    {rate / 1e9:.1f} GFLOP/s in ours, {large / 1e9:.1f} in a dense product of {SQUARE} x {SQUARE}"
                f" ({rate / large:.2f})"
            )
        finish(pipes)


if __name__ == "__main__":
    main()
