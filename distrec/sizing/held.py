"""What a worker holds between steps: the bytes of all arrays that can be reached from its objects, by what they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from distrec.data.dataset import Dataset, Interactions
from distrec.data.histories import Histories
from distrec.data.sampling import Sampler
from distrec.evaluation.ranking import Evaluator
from distrec.graph.matrix import ShardedMatrix
from distrec.methods.base import Method
from distrec.parallel.exchange import Exchange
from distrec.tables.sharded import ShardedTables
from distrec.training.dense import DenseEngine
from distrec.training.ledger import Ledger

LABELS: dict[type, str] = {
    ShardedTables: "tables",
    torch.optim.Optimizer: "moments of tables",
    Interactions: "interactions",
    Sampler: "order of the epoch",
    Ledger: "order of the epoch",
    Histories: "histories",
    ShardedMatrix: "graphs",
    Exchange: "lists of rows to exchange",
    Evaluator: "evaluation",
    Method: "features and other arrays of the method",
}
_APART = (DenseEngine, Dataset)  # DeepSpeed's memory is not reached; a dataset has only its manifest in memory


def held(root: Any) -> dict[str, int]:
    """The bytes of the arrays and tensors that can be reached from `root`, by label; each counts once.

    An object of a class in `LABELS` gives its label to all that is only reached through it.
    """
    found: dict[str, int] = {}
    seen: set[int] = set()

    def walk(value: Any, label: str) -> None:
        if isinstance(value, torch.Tensor | np.ndarray):
            address, size = _memory(value)
            if size and address not in seen:
                seen.add(address)
                found[label] = found.get(label, 0) + size
            return
        if id(value) in seen or isinstance(value, _APART):
            return
        label = next((name for kind, name in LABELS.items() if isinstance(value, kind)), label)
        if isinstance(value, dict):
            inside = list(value.values())
        elif isinstance(value, list | tuple | set):
            inside = list(value)
        elif isinstance(value, torch.optim.Optimizer):
            inside = [value.state, *vars(value).values()]
        elif type(value).__module__.startswith("distrec.") and hasattr(value, "__dict__"):
            inside = list(vars(value).values())
        else:
            return
        seen.add(id(value))
        for entry in inside:
            walk(entry, label)

    walk(root, "other")
    return found


def _memory(array: torch.Tensor | np.ndarray) -> tuple[int, int]:
    """The address and bytes of an array's values; a view counts with the whole memory that it keeps alive."""
    if isinstance(array, torch.Tensor):
        if type(array) not in (torch.Tensor, torch.nn.Parameter):
            return 0, 0
        storage = array.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.__array_interface__["data"][0], array.nbytes
