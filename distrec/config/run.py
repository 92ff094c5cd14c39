"""The configuration of one training run, as it stands in `configs/<method>/<dataset>.yaml`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from distrec.config.tree import Section, apply_overrides, decode, load_file


class RunSection(Section):
    """Where a run lives. The name is stable: the same command again continues the run."""

    name: str
    storage: str = "runs"
    graphs: str | None = Field(
        None,
        description="folder or s3:// prefix where runs keep and share neighbour lists of items; null: each computes its own",
    )

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError("must be letters, digits, '.', '_' and '-', since it names a folder")
        return name


class TrainSection(Section):
    """How long, with how many workers, and on which metric epochs are chosen."""

    workers: int = Field(2, ge=0, description="Ray Train workers; 0 runs in this process")
    epochs: int = Field(100, ge=0)
    seed: int = Field(1, ge=0, lt=2**63)
    global_batch: int = Field(2048, ge=1, description="rows per step over all workers together")
    accumulate: int = Field(
        1,
        ge=1,
        description="micro-batches of a global batch: each goes forward and backward by itself, then one update",
    )
    eval_every: int = Field(1, ge=1, description="epochs between evaluations on the validation split")
    patience: int = Field(30, ge=1, description="stop at this many evaluations in a row without strict improvement")
    metric: str = "recall@20"
    cpus_per_worker: float = Field(1.0, gt=0)
    threads: int = Field(1, ge=1, description="CPU threads of each worker's tensor kernels")
    checkpoint_every: int = Field(
        0, ge=0, description="steps between checkpoints within an epoch; 0: end of epoch only"
    )
    max_failures: int = Field(3, ge=0, description="times Ray Train restarts the workers from the last checkpoint")

    @field_validator("metric")
    @classmethod
    def _metric(cls, metric: str) -> str:
        if not re.fullmatch(r"(recall|ndcg|precision|map|hit)@[1-9][0-9]*", metric):
            raise ValueError("must be one of recall, ndcg, precision, map, hit at a cut-off, for example recall@20")
        return metric


class LrDecay(Section):
    """Learning rate of epoch e: `lr * factor ** (e / epochs)`, with a fractional exponent."""

    factor: float = Field(gt=0, le=1)
    epochs: float = Field(gt=0)


class OptimizerSection(Section):
    """One optimizer rule for tables and dense weights alike."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = Field(1e-3, gt=0)
    betas: list[float] = Field([0.9, 0.999], min_length=2, max_length=2)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    lr_decay: LrDecay | None = None
    clip_norm: float = Field(
        0.0, ge=0, description="largest L2 norm of the gradient over all tables and dense weights together; 0: no limit"
    )
    tables: Literal["exact", "sparse"] = Field(
        "exact",
        description="exact: every row of every table steps as the paper's optimizer does; sparse: fused row-wise Adagrad on looked-up rows",
    )

    @field_validator("betas")
    @classmethod
    def _betas(cls, betas: list[float]) -> list[float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("must be two numbers in [0, 1)")
        return betas

    def lr_at(self, epoch: int) -> float:
        """The learning rate of `epoch` (from 0)."""
        if self.lr_decay is None:
            return self.lr
        return self.lr * self.lr_decay.factor ** (epoch / self.lr_decay.epochs)


class DenseSection(Section):
    """DeepSpeed settings of the dense module."""

    zero_stage: int = Field(0, ge=0, le=3)
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="what the module computes in; weights that step, moments and summed gradients stay float32"
    )
    activation_checkpointing: bool = Field(
        False,
        description="blocks that offer it (transformer layers) compute their inner values anew in the backward pass",
    )


class EvaluateSection(Section):
    """Full-ranking evaluation."""

    mask: Literal["train", "train+valid", "none"] = Field(
        "train", description="items left out of a user's ranking; train+valid leaves out valid items at test only"
    )
    test: bool = Field(
        True, description="read the test split at the end, with the weights of the best validation epoch"
    )
    ks: list[int] = Field([5, 10, 20, 50], min_length=1)

    @field_validator("ks")
    @classmethod
    def _ks(cls, ks: list[int]) -> list[int]:
        if any(k < 1 for k in ks) or sorted(set(ks)) != ks:
            raise ValueError("must be cut-offs in ascending order, each at least 1")
        return ks


class TrackingSection(Section):
    """Experiment trackers beside the run folder."""

    tensorboard: bool = True
    mlflow: str | None = Field(None, description="MLflow tracking URI; needs the package mlflow-skinny")


class ChangeSection(Section):
    """Settings that change once so many epochs are done; the last of these is evaluated, and patience counts anew."""

    epoch: int = Field(ge=1, description="epochs done before the change")
    values: dict[str, Any] = Field(
        min_length=1, description="dotted run config keys: the optimizer's settings, and those of the loss"
    )


class RunConfig(Section):
    """One run. `method` stays a mapping here: each method owns and decodes its own fields."""

    data: str
    run: RunSection
    method: dict[str, Any]
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    dense: DenseSection = DenseSection()
    evaluate: EvaluateSection = EvaluateSection()
    tracking: TrackingSection = TrackingSection()
    changes: list[ChangeSection] = Field(
        [], description="a schedule of settings, as population-based training finds one; by ascending epochs"
    )

    @field_validator("changes")
    @classmethod
    def _ascending(cls, changes: list[ChangeSection]) -> list[ChangeSection]:
        epochs = [change.epoch for change in changes]
        if sorted(set(epochs)) != epochs:
            raise ValueError(f"must have ascending epochs; they are {epochs}")
        return changes

    def identity(self, manifest_hash: str) -> dict[str, Any]:
        """What makes two attempts the same run; everything else may change between them, `changes` only ahead of them."""
        return {
            "method": self.method,
            "optimizer": self.optimizer.model_dump(),
            "dense.precision": self.dense.precision,
            "train.seed": self.train.seed,
            "train.global_batch": self.train.global_batch,
            "data": manifest_hash,
        }


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run config in the YAML file `path`, with dotted overrides applied."""
    return decode(RunConfig, apply_overrides(load_file(path), overrides))


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
