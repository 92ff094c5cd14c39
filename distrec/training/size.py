"""The memory and disk space that a run needs at the very least, so that one that cannot fit is refused at the start."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from distrec.config.run import RunConfig
from distrec.data.dataset import Dataset
from distrec.errors import InputError
from distrec.methods.base import Method
from distrec.runtime import check_fits
from distrec.tables.spec import EXTRA_COPIES
from distrec.training.run_folder import RunFolder
from distrec.training.space import free_bytes

_METRICS = 5  # recall, ndcg, precision, map and hit, at every cut-off
MOST_CHECKPOINTS = 4
"""On disk at a time: the newest two and the best epoch, and the one that is being written."""


def check_memory(config: RunConfig, data: Dataset, method: Method) -> None:
    """Refuse a run that certainly exceeds the memory of this machine, on which all of its workers start.

    The workers of a connected cluster are on other machines, so nothing is known here about their memory.

    Raises:
        InputError: the tables, the features, the dense module or the metrics need more memory than the machine has.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    parts = least_bytes(config, data, method)
    largest = max(parts, key=lambda name: parts[name])
    check_fits(
        sum(parts.values()),
        f"method '{config.method['name']}' and this dataset",
        f"most of it is for the {largest}: {_REMEDY[largest]}",
    )


_REMEDY = {
    "tables": "lower the method's widths, or use a cluster",
    "features": "encode into narrower vectors, or use a cluster",
    "dense module": "lower the method's widths and layers or 'train.workers', or raise 'dense.zero_stage'",
    "checkpoint being written": "lower the method's widths, use a local 'run.storage', or a cluster",
    "metrics of all users": "shorten 'evaluate.ks'",
}


def least_bytes(config: RunConfig, data: Dataset, method: Method) -> dict[str, int]:
    """The fewest bytes that each part of a run takes, over all workers together.

    Activations, graphs, interactions and the packages themselves come on top.
    """
    rows = {"user": data.users, "item": data.items}
    extra = EXTRA_COPIES[config.optimizer.name]
    copies = 1 + (extra if config.optimizer.tables == "exact" else 0)
    values = _dense_values(method)
    workers = max(config.train.most_workers, 1)
    features = [data.feature(name) for name in method.features()]
    return {
        "tables": sum(4 * rows[table.side] * table.dim * copies for table in method.tables()),
        "features": sum(2 * data.items * feature.tokens * feature.width for feature in features),  # float16 at least
        # Weights are on every worker; gradients and moments too, unless ZeRO partitions them.
        "dense module": 4 * values * (workers * (1 + extra) if config.dense.zero_stage == 0 else workers + extra),
        # While a save to an object store is in flight, training goes on with the tensors that it copied.
        "checkpoint being written": 0 if RunFolder.of(config).folder.local else checkpoint_bytes(config, data, method),
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


def checkpoint_bytes(config: RunConfig, data: Dataset, method: Method, samples: int = 0) -> int:
    """The bytes of one checkpoint: tables and dense weights with their moments, and a count per sample of an epoch.

    The other tensors that some methods keep, and the JSON files, come on top.
    """
    rows = {"user": data.users, "item": data.items}
    saved = EXTRA_COPIES[config.optimizer.name]  # the weights, and all extra copies but the gradient
    tables = sum(
        4 * rows[table.side] * (table.dim * saved if config.optimizer.tables == "exact" else table.dim + 1)
        for table in method.tables()
    )
    return tables + 4 * _dense_values(method) * saved + samples


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # deleted meanwhile, by an attempt for which this one will be refused
        return 0


def _dense_values(method: Method) -> int:
    with torch.device("meta"):  # shapes without values
        dense = method.dense()
    return 0 if dense is None else sum(parameter.numel() for parameter in dense.parameters())


def _held_out(data: Dataset) -> int:
    return data.manifest.interactions["valid"]
