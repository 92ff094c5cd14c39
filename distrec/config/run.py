"""The configuration of one training run, as in `configs/<method>/<dataset>.yaml`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from distrec.config.bounds import (
    MOST_BATCH,
    MOST_CPUS,
    MOST_CUTOFF,
    MOST_CUTOFFS,
    MOST_EPOCHS,
    MOST_MINUTES,
    MOST_NAME,
    MOST_PIECES,
    MOST_RETRIES,
    MOST_SECONDS,
    MOST_SEED,
    MOST_STEPS,
    MOST_WORKERS,
)
from distrec.config.tree import Section, apply_overrides, decode, load_file


class PlaceSection(Section):
    """Name and folder of a run or sweep. The same name in the same folder continues it."""

    name: str = Field(
        description="name of the run or sweep, and of its folder inside 'storage'; the same name again continues it"
    )
    storage: str = Field("runs", description="folder or s3:// prefix that holds the folders of runs")

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError("must be letters, digits, '.', '_' and '-', since it names a folder")
        if len(name) > MOST_NAME:
            raise ValueError(f"must have at most {MOST_NAME} characters, since it names a folder")
        return name


class RunSection(PlaceSection):
    """Name and folder of a run, and what it shares with other runs."""

    graphs: str | None = Field(
        None,
        description="folder or s3:// prefix where runs share neighbour lists of items; null: each run computes its own",
    )


def _check_cutoffs(ks: Sequence[int | str]) -> None:
    if any(len(str(k)) > len(str(MOST_CUTOFF)) or int(k) > MOST_CUTOFF for k in ks):
        raise ValueError(f"must have cut-offs of at most {MOST_CUTOFF:,}")


class TrainSection(Section):
    """Length of training, workers, batches, and the metric that selects the best epoch."""

    workers: int | list[int] = Field(
        2,
        description="number of Ray Train workers; [least, most]: as many as the cluster has; 0 trains in this process",
    )
    epochs: int = Field(
        100,
        ge=0,
        le=MOST_EPOCHS,
        description="largest number of epochs; training ends earlier when 'patience' runs out",
    )
    seed: int = Field(
        1, ge=0, le=MOST_SEED, description="seed of initial weights, batches, negative samples and dropout"
    )
    global_batch: int = Field(
        2048,
        ge=1,
        le=MOST_BATCH,
        description="rows per step over all workers together; a row is an interaction, or a history for sequential "
        "methods",
    )
    accumulate: int = Field(
        1,
        ge=1,
        le=MOST_PIECES,
        description="micro-batches per global batch; each has its own forward and backward pass before the one update",
    )
    eval_every: int = Field(1, ge=1, le=MOST_EPOCHS, description="epochs between evaluations on the validation split")
    patience: int = Field(
        30,
        ge=1,
        le=MOST_EPOCHS,
        description="number of evaluations in a row without strict improvement after which training stops",
    )
    metric: str = Field(
        "recall@20",
        description="validation metric that selects the best epoch: recall, ndcg, precision, map or hit at one of "
        "'evaluate.ks'",
    )
    cpus_per_worker: float = Field(1.0, gt=0, le=MOST_CPUS, description="CPUs that Ray reserves for each worker")
    threads: int = Field(1, ge=1, le=MOST_CPUS, description="CPU threads for tensor operations in each worker")
    checkpoint_every: int = Field(
        0,
        ge=0,
        le=MOST_STEPS,
        description="steps between checkpoints within an epoch, beside 'checkpoint_minutes'; 0: no such checkpoints",
    )
    checkpoint_minutes: float = Field(
        10.0,
        ge=0,
        le=MOST_MINUTES,
        description="minutes after a checkpoint until the next one is saved within an epoch; 0: no such checkpoints",
    )
    max_failures: int = Field(
        3,
        ge=0,
        le=MOST_RETRIES,
        description="number of failures since the last finished epoch after which workers start again",
    )
    wait_for_cluster: float = Field(
        600,
        ge=0,
        le=MOST_SECONDS,
        description="seconds to wait for a Ray cluster with room for the workers, also after hosts were lost",
    )

    @field_validator("workers", mode="before")
    @classmethod
    def _workers(cls, workers: Any) -> Any:
        ends = workers if isinstance(workers, list) else [workers]
        whole = all(type(end) is int for end in ends)
        if isinstance(workers, list):
            fits = whole and len(ends) == 2 and 1 <= ends[0] <= ends[1] <= MOST_WORKERS
        else:
            fits = whole and 0 <= workers <= MOST_WORKERS
        if not fits:
            raise ValueError(
                f"must be a whole number from 0 to {MOST_WORKERS:,}, or [least, most] with 1 <= least <= most"
            )
        return workers

    @property
    def least_workers(self) -> int:
        """The smallest number of workers that may train; 0 if this process does."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """The largest number of workers that may train; 0 if this process does."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @field_validator("metric")
    @classmethod
    def _metric(cls, metric: str) -> str:
        if not re.fullmatch(r"(recall|ndcg|precision|map|hit)@[1-9][0-9]*", metric):
            raise ValueError("must be one of recall, ndcg, precision, map, hit at a cut-off, for example recall@20")
        _check_cutoffs([metric.partition("@")[2]])
        return metric


class LrDecay(Section):
    """Learning rate of epoch e: `lr * factor ** (e / epochs)`, with a fractional exponent."""

    factor: float = Field(gt=0, le=1, description="factor that multiplies the learning rate over 'epochs' epochs")
    epochs: float = Field(
        gt=0,
        description="number of epochs, not necessarily whole, in which the learning rate is multiplied by 'factor'",
    )


class OptimizerSection(Section):
    """One optimizer rule for tables and dense weights alike."""

    name: Literal["adam", "adamw", "sgd"] = Field(
        "adam", description="update rule of tables and dense weights: adam, adamw or sgd"
    )
    lr: float = Field(1e-3, gt=0, description="learning rate, before any decay")
    betas: list[float] = Field(
        [0.9, 0.999],
        min_length=2,
        max_length=2,
        description="decay rates of the first and second moments in adam and adamw, each in [0, 1)",
    )
    eps: float = Field(
        1e-8, gt=0, description="term added to the denominator of adam and adamw for numerical stability"
    )
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="weight decay: decoupled from the gradient in adamw, an L2 term of the gradient in adam and sgd",
    )
    lr_decay: LrDecay | None = Field(
        None,
        description="decay of the learning rate: epoch e, counted from 0, uses lr * factor ** (e / epochs); null: no "
        "decay",
    )
    clip_norm: float = Field(
        0.0, ge=0, description="largest L2 norm of the gradient over all tables and dense weights together; 0: no limit"
    )
    tables: Literal["exact", "sparse"] = Field(
        "exact",
        description="exact: every row of a table takes the step of 'name'; sparse: only rows looked up, by fused "
        "row-wise Adagrad",
    )

    @field_validator("betas")
    @classmethod
    def _betas(cls, betas: list[float]) -> list[float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("must be two numbers in [0, 1)")
        return betas

    def lr_at(self, epoch: int) -> float:
        """The learning rate of `epoch`, counted from 0."""
        if self.lr_decay is None:
            return self.lr
        return self.lr * self.lr_decay.factor ** (epoch / self.lr_decay.epochs)


class DenseSection(Section):
    """DeepSpeed settings of the dense module."""

    zero_stage: int = Field(
        0,
        ge=0,
        le=3,
        description="DeepSpeed ZeRO stage: 0 partitions nothing, 1 optimizer states, 2 gradients as well, 3 weights "
        "as well",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="number format of the dense module's computation, fp32 or bf16; master weights and moments stay "
        "float32",
    )
    activation_checkpointing: bool = Field(
        False, description="recompute activations of transformer layers in the backward pass instead of keeping them"
    )


class EvaluateSection(Section):
    """Full-ranking evaluation."""

    mask: Literal["train", "train+valid", "none"] = Field(
        "train",
        description="items left out of a user's ranking: train, train+valid (valid items only when ranking test), or "
        "none",
    )
    test: bool = Field(
        True, description="rank the test split after training, with the weights of the best validation epoch"
    )
    ks: list[int] = Field(
        [5, 10, 20, 50],
        min_length=1,
        max_length=MOST_CUTOFFS,
        description="cut-offs of the ranking metrics, in ascending order",
    )

    @field_validator("ks")
    @classmethod
    def _ks(cls, ks: list[int]) -> list[int]:
        if any(k < 1 for k in ks) or sorted(set(ks)) != ks:
            raise ValueError("must be cut-offs in ascending order, each at least 1")
        _check_cutoffs(ks)
        return ks


class TrackingSection(Section):
    """Experiment trackers beside the run folder."""

    tensorboard: bool = Field(True, description="write event files for TensorBoard into the folder of the run or sweep")
    mlflow: str | None = Field(
        None, description="MLflow tracking URI, which needs the package mlflow-skinny; null: no MLflow"
    )


class ChangeSection(Section):
    """Settings that change after some epochs; the last epoch before the change is evaluated, and patience restarts."""

    epoch: int = Field(ge=1, le=MOST_EPOCHS, description="number of epochs trained before the change")
    values: dict[str, Any] = Field(
        min_length=1,
        description="new values by dotted run config key: the optimizer's lr, weight_decay and clip_norm, and "
        "settings of the loss",
    )


class RunConfig(Section):
    """One run. `method` stays a mapping here: each method owns and decodes its own fields."""

    data: str = Field(description="folder or s3:// prefix of the prepared dataset")
    run: RunSection = Field(description="name and place of the run")
    method: dict[str, Any] = Field(
        description="method and its settings; numbers in brackets are sections of docs/methods/<name>.md"
    )
    train: TrainSection = Field(
        TrainSection(), description="length of training, workers, batches, and the metric that selects the best epoch"
    )
    optimizer: OptimizerSection = Field(OptimizerSection(), description="update rule of tables and dense weights")
    dense: DenseSection = Field(DenseSection(), description="settings of DeepSpeed, which trains the dense module")
    evaluate: EvaluateSection = Field(EvaluateSection(), description="full ranking of the validation and test splits")
    tracking: TrackingSection = Field(TrackingSection(), description="experiment trackers beside the run folder")
    changes: list[ChangeSection] = Field(
        [],
        description="schedule of settings that change during training, by ascending epoch, such as population-based "
        "training finds",
    )

    @field_validator("changes")
    @classmethod
    def _ascending(cls, changes: list[ChangeSection]) -> list[ChangeSection]:
        epochs = [change.epoch for change in changes]
        if sorted(set(epochs)) != epochs:
            raise ValueError(f"must have ascending epochs; they are {epochs}")
        return changes

    def identity(self, manifest_hash: str) -> dict[str, Any]:
        """The settings that must be equal in all attempts of a run.

        They decide what is trained, which epoch is the best, and by which rule all values of the run are measured. All
        other settings may change between attempts. Of `changes`, only those that the run has not reached may change;
        the caller checks that.
        """
        return {
            "method": self.method,
            "optimizer": self.optimizer.model_dump(),
            "dense.precision": self.dense.precision,
            "train.seed": self.train.seed,
            "train.global_batch": self.train.global_batch,
            "train.metric": self.train.metric,
            "evaluate.mask": self.evaluate.mask,
            "evaluate.ks": self.evaluate.ks,
            "data": manifest_hash,
        }


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run config in the YAML file `path`, with dotted overrides applied.

    Raises:
        InputError: the file, an override or a key is invalid.
    """
    return decode(RunConfig, apply_overrides(load_file(path), overrides))


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
