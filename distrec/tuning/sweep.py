"""The configuration of a sweep, as in `configs/sweeps/<name>.yaml`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from distrec.config.bounds import (
    MOST_CPUS,
    MOST_EPOCHS,
    MOST_NAME,
    MOST_RETRIES,
    MOST_SECONDS,
    MOST_SEEDS,
    MOST_TRIALS,
    MOST_WIDTH,
    MOST_WORKERS,
)
from distrec.config.run import EvaluateSection, PlaceSection, TrackingSection, TrainSection
from distrec.config.tree import Section, apply_overrides, decode, load_file
from distrec.errors import shown


class EntrySection(Section):
    """One method of the sweep: the run config that its search starts from, and the space that it searches."""

    config: str = Field(
        description="run config that the search starts from; the method's first trial is this config as it stands"
    )
    spaces: list[str] = Field([], description="names of search spaces in the file search.yaml beside 'config'")
    space: dict[str, Any] = Field(
        {},
        description="more dotted run config keys to search, each a list of values or a range {low, high}; these "
        "override 'spaces'",
    )
    overrides: dict[str, Any] = Field(
        {}, description="values of dotted run config keys, set in every trial of the method"
    )


class BudgetSection(Section):
    """When the search ends: at `trials` or `hours`, whichever comes first. The winners' fresh seeds are extra."""

    trials: int | None = Field(
        None, ge=1, le=MOST_TRIALS, description="number of trials of all methods together; null: no limit"
    )
    hours: float | None = Field(
        None,
        gt=0,
        description="hours after which no new trial starts once each method has 'min_trials'; begun trials finish; "
        "null: no limit",
    )
    epochs: int | None = Field(
        None,
        ge=1,
        le=MOST_EPOCHS,
        description="largest number of epochs per trial; a run config with fewer keeps its own; null: no limit",
    )
    min_trials: int = Field(
        1,
        ge=1,
        le=MOST_TRIALS,
        description="trials of each method before the weaker half of the methods is dropped, each time; with pbt, "
        "size of a population",
    )


class AshaSection(Section):
    """Asynchronous successive halving among the trials of one method, never across methods."""

    grace: int = Field(5, ge=1, le=MOST_EPOCHS, description="epochs before a trial may be stopped")
    factor: int = Field(
        3, ge=2, le=MOST_TRIALS, description="reduction factor: about one in 'factor' trials passes each rung"
    )


class PbtSection(Section):
    """Population-based training: at each comparison, clones of strong trials replace weak ones, with other values of
    the parameters that may change while a run trains. A population is `budget.min_trials` trials of one method.
    """

    interval: int = Field(
        5,
        ge=1,
        le=MOST_EPOCHS,
        description="epochs between comparisons of a population, rounded up to whole evaluations",
    )
    quantile: float = Field(
        0.25,
        gt=0,
        le=0.5,
        description="fraction of a population, rounded up, that is replaced by clones of the equally many best trials",
    )
    resample: float = Field(
        0.25,
        ge=0,
        le=1,
        description="probability that a clone's parameter is drawn anew; otherwise it moves by a fifth, or to the "
        "next value listed",
    )


class ResourceSection(Section):
    """What each trial reserves. As many trials run at the same time as fit on the cluster."""

    workers: int = Field(
        0,
        ge=0,
        le=MOST_WORKERS,
        description="number of Ray Train workers per trial; 0 trains in the trial's own process",
    )
    cpus_per_worker: float = Field(1.0, gt=0, le=MOST_CPUS, description="CPUs that Ray reserves for each worker")
    threads: int = Field(1, ge=1, le=MOST_CPUS, description="CPU threads for tensor operations in each worker")
    wait_for_cluster: float = Field(
        600,
        ge=0,
        le=MOST_SECONDS,
        description="seconds to wait for a Ray cluster with room for a trial, also after hosts were lost",
    )


class PrepareSection(Section):
    """How to prepare `data` if it does not exist yet."""

    config: str = Field(description="data config of the dataset")
    source: str = Field(description="folder or s3:// prefix of the raw data; 'demo' generates the demo shop")
    tokens: bool = Field(False, description="encode word pieces and image patches as well")
    image_pool: int | None = Field(
        None,
        ge=2,
        le=MOST_WIDTH,
        description="with 'tokens': average each image's feature map down to this many rows and columns; null: keep "
        "its size",
    )


class PublishedSection(Section):
    """Published values to show next to an entry's. Give them only if dataset and protocol are the same."""

    entry: str = Field(description="method of the sweep, by its key under 'methods', that the numbers belong to")
    source: str = Field(description="where the numbers were published")
    metrics: dict[str, float] = Field(description="published values by metric, such as recall@20")
    note: str = Field("", description="remark shown beside the numbers")


class SweepConfig(Section):
    """One sweep: one dataset, one protocol, one metric, one budget, several methods."""

    run: PlaceSection = Field(description="name and place of the sweep")
    data: str = Field(description="folder or s3:// prefix of the prepared dataset that all trials use")
    methods: dict[str, EntrySection] = Field(min_length=1, description="methods to search, by a label of your choice")
    budget: BudgetSection = Field(
        description="when the search ends: as soon as 'trials' or 'hours' is reached; the winners' seeds come on top"
    )
    prepare: PrepareSection | None = Field(
        None,
        description="how to prepare and encode the dataset at 'data' as far as it is missing; null: it must be "
        "complete",
    )
    metric: str = Field(
        "recall@20",
        description="validation metric that trials are compared by: recall, ndcg, precision, map or hit at one of "
        "'evaluate.ks'",
    )
    evaluate: EvaluateSection = Field(EvaluateSection(), description="full ranking of the validation and test splits")
    overrides: dict[str, Any] = Field(
        {}, description="values of dotted run config keys, set in every trial of every method"
    )
    searcher: Literal["random", "grid", "tpe"] = Field(
        "random",
        description="how new trials are chosen: random, grid (all combinations), or tpe (Optuna's Parzen estimators)",
    )
    scheduler: Literal["asha", "pbt", "none"] = Field(
        "none", description="asha stops weak trials early, pbt trains populations, none lets every trial finish"
    )
    asha: AshaSection = Field(
        AshaSection(), description="settings of asynchronous successive halving, used when 'scheduler' is asha"
    )
    pbt: PbtSection = Field(
        PbtSection(), description="settings of population-based training, used when 'scheduler' is pbt"
    )
    seed: int = Field(
        1, ge=0, lt=2**62, description="seed of the search and of every trial; the winners get the seeds after it"
    )
    seeds: int = Field(
        5,
        ge=1,
        le=MOST_SEEDS,
        description="number of fresh seeds that each method's winner is trained and tested with",
    )
    resources: ResourceSection = Field(
        ResourceSection(), description="what each trial takes; as many trials run at once as the cluster has room for"
    )
    retries: int = Field(
        2, ge=0, le=MOST_RETRIES, description="number of times a trial that died restarts from its last checkpoint"
    )
    tracking: TrackingSection = Field(TrackingSection(), description="experiment trackers of the whole sweep")
    published: list[PublishedSection] = Field(
        [], description="published numbers to show in the report, for the same dataset and protocol"
    )

    @field_validator("metric")
    @classmethod
    def _metric(cls, metric: str) -> str:
        return TrainSection(metric=metric).metric

    @field_validator("methods")
    @classmethod
    def _labels(cls, methods: dict[str, EntrySection]) -> dict[str, EntrySection]:
        for label in methods:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", label):
                raise ValueError(f"must have plain labels, since they name folders; {shown(label)} is not one")
            if len(label) > MOST_NAME:
                raise ValueError(f"must have labels of at most {MOST_NAME} characters, since they name folders")
        return methods


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """The sweep config in the YAML file `path`, with dotted overrides applied."""
    return decode(SweepConfig, apply_overrides(load_file(path), overrides))
