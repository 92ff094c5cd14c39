"""The methods by name. A new method is one module and one line here."""

from __future__ import annotations

from typing import Any

from distrec.config import RunConfig, decode, nearest
from distrec.config.tree import set_keys
from distrec.data.dataset import Dataset
from distrec.errors import InputError, shown
from distrec.methods.alignrec import AlignRec
from distrec.methods.base import Method
from distrec.methods.bivrec import BiVRec
from distrec.methods.bm3 import BM3
from distrec.methods.bprmf import BprMf
from distrec.methods.freedom import FREEDOM
from distrec.methods.lightgcn import LightGCN
from distrec.methods.mentor import MENTOR
from distrec.methods.odmt import ODMT
from distrec.methods.popularity import Popularity
from distrec.methods.sasrec import SASRec
from distrec.methods.stair import STAIR
from distrec.methods.vbpr import VBPR

METHODS: dict[str, type[Method]] = {
    "alignrec": AlignRec,
    "mentor": MENTOR,
    "stair": STAIR,
    "odmt": ODMT,
    "bivrec": BiVRec,
    "vbpr": VBPR,
    "bm3": BM3,
    "freedom": FREEDOM,
    "lightgcn": LightGCN,
    "sasrec": SASRec,
    "bprmf": BprMf,
    "popularity": Popularity,
}

_CHANGEABLE = ("optimizer.lr", "optimizer.weight_decay", "optimizer.clip_norm")
_SPARSE_WIDTH = 4  # fbgemm's fused kernel needs widths that are a multiple of it


def method_config(tree: dict[str, Any]) -> Any:
    """The typed settings of the method that `method.name` names.

    Raises:
        InputError: unknown method or key, or an invalid value.
    """
    name = tree.get("name")
    if name is None:
        raise InputError(f"key 'method.name' is missing; name one of {', '.join(METHODS)}.")
    if not isinstance(name, str) or name not in METHODS:
        raise InputError(f"key 'method.name' is {shown(name)}, an unknown method; {nearest(str(name), list(METHODS))}.")
    return decode(METHODS[name].Config, tree, "method")


def resolve(config: RunConfig) -> RunConfig:
    """`config` with the method's defaults filled in, so that two configs that mean the same are equal.

    Raises:
        InputError: unknown method or key, an invalid value, or settings that do not go together.
    """
    method = method_config(config.method)
    kind = METHODS[config.method["name"]]
    if config.optimizer.tables == "sparse" and (kind.whole_tables or not kind.trainable):
        raise InputError(
            f"key 'optimizer.tables' is 'sparse' but {config.method['name']} works on whole tables; use 'exact', or "
            "a method that only looks up rows, such as bprmf."
        )
    if config.optimizer.tables == "sparse" and config.optimizer.weight_decay:
        raise InputError(
            "key 'optimizer.weight_decay' must be 0 with 'optimizer.tables: sparse', which never touches rows outside "
            "the batch."
        )
    if config.optimizer.tables == "sparse" and config.optimizer.clip_norm:
        raise InputError(
            "key 'optimizer.clip_norm' must be 0 with 'optimizer.tables: sparse', which steps inside the backward "
            "pass, before the gradient's norm is known."
        )
    if config.train.accumulate > 1 and not kind.sum_over_rows:
        raise InputError(
            f"key 'train.accumulate' is {config.train.accumulate} but the loss of {config.method['name']} is not a sum "
            "over the batch's rows; use 1, or a method whose loss is, such as bprmf."
        )
    if config.train.accumulate > 1 and config.optimizer.tables == "sparse":
        raise InputError(
            "key 'train.accumulate' must be 1 with 'optimizer.tables: sparse', which steps inside every backward pass."
        )
    if config.dense.precision == "bf16" and config.dense.zero_stage == 0:
        raise InputError(
            "key 'dense.zero_stage' is 0 but 'dense.precision: bf16' needs 1, 2 or 3, since DeepSpeed cannot sum "
            "bfloat16 gradients in float32 without ZeRO."
        )
    resolved = config.model_copy(update={"method": method.model_dump()})
    _check_changes(resolved)
    return resolved


def changeable(config: RunConfig) -> list[str]:
    """The dotted keys that may change while a run trains: none of them affects tables, batches, graphs or scores."""
    kind = METHODS[config.method["name"]]
    return [*_CHANGEABLE, *(f"method.{name}" for name in kind.changeable)] if kind.trainable else []


def stretches(config: RunConfig) -> list[RunConfig]:
    """A resolved run as stretches of epochs with constant settings; the `train.epochs` of each is where it ends.

    Changes at or after the end of the run are left out.
    """
    reached = [change for change in config.changes if change.epoch < config.train.epochs]
    tree = set_keys(config.model_dump(), {"changes": []}, "changes")
    out = []
    for values, end in zip(
        [{}, *(change.values for change in reached)],
        [*(change.epoch for change in reached), config.train.epochs],
        strict=True,
    ):
        tree = set_keys(tree, {**values, "train.epochs": end}, f"changes up to epoch {end}")
        out.append(resolve(decode(RunConfig, tree)))
    return out


def _check_changes(config: RunConfig) -> None:
    allowed = changeable(config)
    if config.changes and not allowed:
        raise InputError(f"key 'changes' is set but {config.method['name']} does not train; remove it.")
    for change in config.changes:
        for key in change.values:
            if key not in allowed:
                raise InputError(
                    f"key 'changes' sets {shown(key)} after epoch {change.epoch}, which cannot change while "
                    f"{config.method['name']} trains; {nearest(key, allowed)}."
                )
    if config.changes:  # every change is checked, even those that this run is too short to reach
        epochs = max(config.train.epochs, config.changes[-1].epoch + 1)
        stretches(config.model_copy(update={"train": config.train.model_copy(update={"epochs": epochs})}))


def build_method(config: RunConfig, data: Dataset) -> Method:
    """The method of a resolved config, checked against the dataset.

    Raises:
        InputError: the dataset lacks what the method needs, or its widths do not suit sparse tables.
    """
    method = METHODS[config.method["name"]](method_config(config.method), data)
    for table in method.tables() if config.optimizer.tables == "sparse" else []:
        if table.dim % _SPARSE_WIDTH:
            raise InputError(
                f"table '{table.name}' is {table.dim} wide but 'optimizer.tables: sparse' needs a multiple of "
                f"{_SPARSE_WIDTH}; change 'method.dim' or use 'optimizer.tables: exact'."
            )
    return method
