"""The memory and disk space that a run needs at the very least, so that one that cannot fit is refused at the start."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from distrec.config.run import RunConfig
from distrec.data.dataset import Dataset
from distrec.errors import InputError
from distrec.methods.base import Method
from distrec.parallel.partition import Partition
from distrec.runtime import check_fits
from distrec.tables.spec import EXTRA_COPIES
from distrec.training.disk import free_bytes
from distrec.training.run_folder import RunFolder

_METRICS = 5  # recall, ndcg, precision, map and hit, at every cut-off
MOST_CHECKPOINTS = 4
"""On disk at a time: the newest two and the best epoch, and the one that is being written."""


def check_memory(config: RunConfig, data: Dataset, method: Method) -> None:
    """Refuse a run that certainly exceeds the memory of this machine, on which all of its workers start.

    The workers of a connected cluster are on other machines. There, each one compares at its start (`check_host`).

    Raises:
        InputError: the parts of the workers, and the metrics, need more memory than the machine has.
    """
    if not os.environ.get("RAY_ADDRESS"):
        workers = max(config.train.least_workers, 1)
        _check_workers(config, data, method, workers, workers)


def check_host(config: RunConfig, data: Dataset, method: Method, workers: int, here: int, host: str) -> None:
    """Refuse what certainly exceeds the memory of this host, before a worker on it allocates anything large.

    Args:
        workers: number of all workers.
        here: number of those on this host.
        host: name of this host.

    Raises:
        InputError: their parts need more memory than the host, or the container, has.
    """
    _check_workers(config, data, method, workers, here, f"host '{host}'")


def _check_workers(
    config: RunConfig, data: Dataset, method: Method, workers: int, here: int, place: str = "this machine"
) -> None:
    parts = least_bytes(config, data, method, workers, here)
    largest = max(parts, key=lambda name: parts[name])
    check_fits(
        sum(parts.values()),
        f"method '{config.method['name']}' and this dataset",
        f"most of it is for the {largest}: {_REMEDY[largest]}",
        place,
    )


_REMEDY = {
    "tables": "lower the method's widths, or use a cluster",
    "moments and gradients of tables": "lower the method's widths, or use a cluster",
    "features": "encode into narrower vectors, or use a cluster",
    "dense module": "lower the method's widths and layers or 'train.workers', or raise 'dense.zero_stage'",
    "interactions": "use larger machines, or fewer workers on each: every worker holds all of them",
    "order of the epoch": "use larger machines, or fewer workers on each: every worker holds all of it",
    "checkpoint being written": "lower the method's widths, use a local 'run.storage', or a cluster",
    "metrics of all users": "shorten 'evaluate.ks'",
}


def least_bytes(config: RunConfig, data: Dataset, method: Method, workers: int, here: int) -> dict[str, int]:
    """The fewest bytes that each part of a run takes on a host with the last `here` of `workers` workers.

    Activations, graphs and the packages themselves come on top.
    """
    values = dense_values(method)
    ranks = range(workers - here, workers)  # the last blocks are the shortest, so any `here` workers take as much
    of_ranks = [worker_parts(config, data, method, workers, values, rank) for rank in ranks]
    return {name: sum(parts[name] for parts in of_ranks) for name in of_ranks[0]}


def worker_parts(
    config: RunConfig, data: Dataset, method: Method, workers: int, values: int, rank: int = 0
) -> dict[str, int]:
    """The bytes of a worker's parts that follow from config and dataset alone, each exact or the fewest possible.

    Args:
        workers: number of all workers; 0 as 1.
        values: number of weights of the dense module (`dense_values`).
        rank: the worker's rank; rank 0 has the most rows.
    """
    size = max(workers, 1)
    rows = {side: Partition(count, size).count(rank) for side, count in (("user", data.users), ("item", data.items))}
    extra = EXTRA_COPIES[config.optimizer.name]
    tables = sum(4 * rows[table.side] * table.dim for table in method.tables())
    exact = config.optimizer.tables == "exact"
    sums = sum(4 * rows[table.side] for table in method.tables())  # of squares, for row-wise Adagrad
    samples = data.manifest.interactions["train"] if method.trainable else 0
    features = [data.feature(name) for name in method.features()]
    # Vectors are held in float32, and tokens as they are stored.
    held = [(2 if feature.tokens > 1 else 4) * feature.tokens * feature.width for feature in features]
    remote = not RunFolder.of(config).folder.local
    return {
        "tables": tables,
        "moments and gradients of tables": tables * extra if exact else sums,
        "features": rows["item"] * sum(held),
        # Weights are on every worker; gradients and moments too, unless ZeRO partitions them.
        "dense module": 4 * values + 4 * values * extra // (1 if config.dense.zero_stage == 0 else size),
        "interactions": 16 * data.manifest.interactions["train"],
        "order of the epoch": 8 * samples if not method.reads_histories else 0,
        # While a save to an object store is in flight, training goes on with the tensors that it copied.
        "checkpoint being written": checkpoint_bytes(config, data, method, values=values) // size if remote else 0,
        "metrics of all users": 8 * _METRICS * len(config.evaluate.ks) * min(data.users, _held_out(data)),
    }


def check_disk(config: RunConfig, data: Dataset, method: Method, samples: int) -> None:
    """Refuse a run whose checkpoints certainly do not fit on the local disk of its folder.

    Nothing is known about the room of an object store.

    Args:
        samples: number of samples in an epoch.

    Raises:
        InputError: they do not fit into what is free there and what the run's own checkpoints take now.
    """
    run = RunFolder.of(config)
    if not run.folder.local or not method.trainable:
        return
    one, free = checkpoint_bytes(config, data, method, samples), free_bytes(run.folder)
    taken = sum(map(_size, Path(run.checkpoints.path).rglob("*.*")))
    if MOST_CHECKPOINTS * one > free + taken:
        has = f"{free:,} bytes free" + (f" and {taken:,} in the run's checkpoints" if taken else "")
        raise InputError(
            f"run '{run.folder}' needs at least {MOST_CHECKPOINTS * one:,} bytes of disk for up to {MOST_CHECKPOINTS} "
            f"checkpoints at a time, but there are {has}; free the rest, or give a folder on a larger disk as "
            "'run.storage'."
        )


def checkpoint_bytes(
    config: RunConfig, data: Dataset, method: Method, samples: int = 0, values: int | None = None
) -> int:
    """The bytes of one checkpoint: tables and dense weights with their moments, and a count per sample of an epoch.

    The other tensors that some methods keep, and the JSON files, come on top.
    """
    rows = {"user": data.users, "item": data.items}
    saved = EXTRA_COPIES[config.optimizer.name]  # the weights, and all extra copies but the gradient
    tables = sum(
        4 * rows[table.side] * (table.dim * saved if config.optimizer.tables == "exact" else table.dim + 1)
        for table in method.tables()
    )
    return tables + 4 * (dense_values(method) if values is None else values) * saved + samples


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # deleted meanwhile, by an attempt for which this one will be refused
        return 0


def dense_values(method: Method) -> int:
    """The number of weights of a method's dense module."""
    with torch.device("meta"):  # shapes without values
        dense = method.dense()
    return 0 if dense is None else sum(parameter.numel() for parameter in dense.parameters())


def _held_out(data: Dataset) -> int:
    return data.manifest.interactions["valid"]
