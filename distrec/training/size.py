"""The memory that a run needs at the very least, so that a run that cannot fit is refused before it starts."""

from __future__ import annotations

import os

import torch

from distrec.config.run import RunConfig
from distrec.data.dataset import Dataset
from distrec.methods.base import Method
from distrec.runtime import check_fits
from distrec.tables.spec import EXTRA_COPIES

_METRICS = 5  # recall, ndcg, precision, map and hit, at every cut-off


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
    "metrics of all users": "shorten 'evaluate.ks'",
}


def least_bytes(config: RunConfig, data: Dataset, method: Method) -> dict[str, int]:
    """The fewest bytes that each part of a run takes, over all workers together.

    Activations, graphs, interactions and the packages themselves come on top.
    """
    rows = {"user": data.users, "item": data.items}
    extra = EXTRA_COPIES[config.optimizer.name]
    copies = 1 + (extra if config.optimizer.tables == "exact" else 0)
    with torch.device("meta"):  # shapes without values
        dense = method.dense()
    values = 0 if dense is None else sum(parameter.numel() for parameter in dense.parameters())
    workers = max(config.train.most_workers, 1)
    features = [data.feature(name) for name in method.features()]
    return {
        "tables": sum(4 * rows[table.side] * table.dim * copies for table in method.tables()),
        "features": sum(2 * data.items * feature.tokens * feature.width for feature in features),  # float16 at least
        # Weights are on every worker; gradients and moments too, unless ZeRO partitions them.
        "dense module": 4 * values * (workers * (1 + extra) if config.dense.zero_stage == 0 else workers + extra),
        "metrics of all users": 8 * _METRICS * len(config.evaluate.ks) * min(data.users, _held_out(data)),
    }


def _held_out(data: Dataset) -> int:
    return data.manifest.interactions["valid"]
