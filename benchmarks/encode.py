"""Items per second of each default encoder, by number of workers.

    python benchmarks/encode.py --source DIR [--items 512] [--workers 1 2] [--shard 64]

DIR is a prepared dataset with raw content. Each worker loads its models and encodes one shard before the clock starts.
The time covers decoding, the model and writing the vectors, as in `distrec encode`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from itertools import islice
from typing import Any

from distrec.data.dataset import Dataset
from distrec.encoders.base import MODALITIES, Modality
from distrec.encoders.cache import content_hash
from distrec.encoders.pool import Job, Pool, Shard
from distrec.encoders.registry import DEFAULTS, make_encoder


def contents(dataset: Dataset, modality: Modality, count: int) -> list[Any]:
    rows = (row for batch in dataset.content([modality]) for row in batch[modality].to_pylist())
    return list(islice((row for row in rows if row), count))


def shards(chosen: list[Any], size: int) -> list[Shard]:
    cut = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    return [Shard([content_hash(content) for content in part], part) for part in cut]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="a prepared dataset with raw content")
    parser.add_argument("--items", type=int, default=512)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="0 encodes in this process")
    parser.add_argument("--shard", type=int, default=64)
    options = parser.parse_args()
    dataset = Dataset.open(options.source)
    load = os.getloadavg()[0]
    print(
        f"{options.items} items of {dataset.manifest.name}, 1 thread per worker, "
        f"load {load:.1f} on {os.cpu_count()} CPUs"
    )
    print(f"{'modality':9} {'encoder':20} {'workers':>7} {'start s':>8} {'items/s':>8}")
    for workers in options.workers:
        with Pool(workers, threads=1) as pool, tempfile.TemporaryDirectory() as scratch:
            for modality in MODALITIES:
                job = Job(make_encoder(modality, DEFAULTS[modality]), f"{scratch}/{modality}", None)
                work = shards(contents(dataset, modality, options.items), options.shard)
                begun = time.perf_counter()
                for _ in pool.run(job, iter(work[: max(2 * workers, 1)])):
                    pass
                warm = time.perf_counter()
                done = sum(rows for _, rows in pool.run(job, iter(work)))
                rate = done / (time.perf_counter() - warm)
                print(f"{modality:9} {DEFAULTS[modality]:20} {workers:7} {warm - begun:8.1f} {rate:8.1f}", flush=True)


if __name__ == "__main__":
    main()
