"""Epochs of LightGCN and steps of AlignRec at Amazon Baby's size against plain single-process programs.

    python benchmarks/training_step.py --data DIR [--threads 1 2] [--turns 7]

DIR is the prepared dataset `baby`. AlignRec gets random features of width 768, since Baby has none. Each program has
its own process: the project's with its memory settings, the plain one without them and once more with them. They start
from the same weights, and their losses on the same batches are compared. Then they take turns of an epoch of LightGCN
or ten steps of AlignRec. A ratio is the median over neighbouring turns.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import plain
from turns import OURS_IMPORTS, Ours, Program, Start, finish, report, running, turn

from distrec.config.run import RunConfig
from distrec.data.dataset import Dataset, vector_table, write_part
from distrec.data.manifest import FeatureEntry, write_manifest
from distrec.data.storage import open_folder

BATCH, WIDTH, COMPARED = 2048, 768, 10
PORTION = 10  # steps in a turn of AlignRec; a turn of LightGCN is an epoch
METHODS = ("lightgcn", "alignrec")


@contextmanager
def with_features(source: str, widths: Mapping[str, int] | None = None, clusters: int = 0) -> Iterator[str]:
    """A copy of a prepared dataset's interactions with random features, deleted at the end of the block.

    Args:
        widths: the width of each feature set; by default one set of width `WIDTH`.
        clusters: the number of clusters of items, which all feature sets show; by default there are no clusters.
    """
    data, draw = Dataset.open(source), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as path:
        folder = open_folder(path)
        files = {
            name: entry for name, entry in data.manifest.files.items() if not name.startswith(("features/", "content/"))
        }
        for name in files:
            folder.write_bytes(data.folder.read_bytes(name), *name.split("/"))
        features, cluster = {}, draw.integers(0, clusters, data.items) if clusters else None
        for name, width in (widths or {"drawn": WIDTH}).items():
            values = draw.standard_normal((data.items, width), np.float32)
            if cluster is not None:
                values += draw.standard_normal((clusters, width), np.float32)[cluster]
            part = f"features/{name}/part-00000.parquet"
            files[part] = write_part(folder, part, vector_table(0, values, np.zeros(data.items, bool)))
            features[name] = FeatureEntry(width=width, dtype="float32", missing=0, source="drawn", parts=[part])
        manifest = data.manifest.model_copy(update={"features": features, "files": files, "content": {}})
        write_manifest(folder, manifest)
        yield path


def run_config(data: str, method: str, settings: Mapping[str, Any] | None = None, **sections: Any) -> RunConfig:
    """The shipped settings of the method for Baby; AlignRec has its defaults. `settings` are the method's own."""
    from distrec.methods.registry import resolve

    chosen = {"name": method, **({"features": ["drawn"]} if method == "alignrec" else settings or {})}
    tree = {"data": data, "run": {"name": "benchmark"}, "method": chosen, **sections}
    tree["train"] = {"global_batch": BATCH, **tree.get("train", {})}
    return resolve(RunConfig.model_validate(tree))


def programs(path: str, method: str) -> list[Program]:
    build = partial(plainly, path, method)
    return [
        Program("distrec", partial(ours, path, method), OURS_IMPORTS, tuned=True),
        Program("plain", build),
        Program("plain, tuned memory", build, tuned=True),
    ]


def ours(path: str, method: str, start: Start | None) -> Ours:
    return Ours(path, run_config(path, method))


def plainly(path: str, method: str, start: Start) -> plain.Program:
    return plain.PROGRAMS[method](Dataset.open(path), start.weights, BATCH, 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the prepared dataset baby")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=7, help="turns of each program")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    arguments = parser.parse_args()
    with with_features(arguments.data) as path:
        data = Dataset.open(path)
        steps = -(-data.manifest.interactions["train"] // BATCH)
        for method in arguments.methods:
            print(f"{method}: {data.users} users, {data.items} items, batches of {BATCH}, {steps} steps an epoch")
            with running(programs(path, method), COMPARED, 1e-5) as (_, pipes):
                for threads in arguments.threads:
                    print(f"  {threads} thread{'s' * (threads > 1)}, load {os.getloadavg()[0]:.1f} before", flush=True)
                    turn(pipes, threads, 2, sampling=True)  # warms up
                    if method == "lightgcn":
                        report([turn(pipes, threads, steps, True) for _ in range(arguments.turns)], 1, "an epoch")
                    else:
                        report(
                            [turn(pipes, threads, PORTION, False) for _ in range(arguments.turns)], PORTION, "a step"
                        )
                finish(pipes)


if __name__ == "__main__":
    main()
