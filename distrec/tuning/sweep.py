"""The configuration of a sweep, as in `configs/sweeps/<name>.yaml`, and the run configs that follow from it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from distrec.config.bounds import (
    MOST_CPUS,
    MOST_EPOCHS,
    MOST_NAME,
    MOST_RETRIES,
    MOST_SEEDS,
    MOST_TRIALS,
    MOST_WIDTH,
    MOST_WORKERS,
)
from distrec.config.paths import local_path
from distrec.config.run import EvaluateSection, PlaceSection, RunConfig, TrackingSection, TrainSection
from distrec.config.tree import Section, apply_overrides, decode, load_file, nearest, set_keys
from distrec.errors import InputError, shown
from distrec.methods.registry import changeable, resolve
from distrec.tuning.space import Range, Space, Values, grid, load_spaces, parse_space

SEARCH_FILE = "search.yaml"


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


@dataclass(frozen=True)
class Entry:
    """A resolved method of the sweep: the run config that its trials start from, and the space of their settings."""

    label: str
    base: RunConfig
    space: Space

    def interval(self, pbt: PbtSection) -> int:
        """Epochs between two comparisons of a population, rounded up to a multiple of `train.eval_every`."""
        every = self.base.train.eval_every
        return -(-pbt.interval // every) * every

    @property
    def changeable(self) -> Space:
        """The part of the space that may change while a run trains."""
        allowed = changeable(self.base)
        return {key: candidates for key, candidates in self.space.items() if key in allowed}

    def trial(
        self,
        settings: Sequence[tuple[int, Values]],
        name: str,
        storage: str,
        seed: int,
        test: bool,
        graphs: str | None = None,
        epochs: int | None = None,
    ) -> RunConfig:
        """The run config of a trial.

        Args:
            settings: pairs of an epoch and the values that apply after it; the first pair applies from the start.
            name: the name of the run.
            storage: the folder or `s3://` prefix that holds the run's folder.
            seed: the seed of the run.
            test: whether the run reads the test split, as only a winner's fresh seeds do.
            graphs: the folder of neighbour lists that runs share, if any.
            epochs: the last epoch, if the trial ends before its run config does.
        """
        (_, first), *later = settings
        tree, before = set_keys(self.base.model_dump(), first, f"method '{self.label}'"), first
        changes = []
        for epoch, values in later:
            new = {key: value for key, value in values.items() if before.get(key) != value}
            changes += [{"epoch": epoch, "values": new}] if new else []
            before = values
        own = {
            "run": {"name": name, "storage": storage, "graphs": graphs},
            "train.seed": seed,
            "evaluate.test": test,
            "changes": changes,
            **({} if epochs is None else {"train.epochs": epochs}),
        }
        return resolve(decode(RunConfig, set_keys(tree, own, f"method '{self.label}'")))


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """The sweep config in the YAML file `path`, with dotted overrides applied."""
    return decode(SweepConfig, apply_overrides(load_file(path), overrides))


def resolve_entries(sweep: SweepConfig) -> dict[str, Entry]:
    """The base config and space of every method. Every candidate is checked against the config.

    Raises:
        InputError: a parameter is unknown (the message names the nearest), settings contradict each other, the metric
            is not computed, or the budget is too small for `budget.min_trials` trials per method.
    """
    _check_budget(sweep)
    entries = {label: _entry(sweep, label, section) for label, section in sweep.methods.items()}
    if sweep.scheduler == "pbt":
        _check_populations(sweep, entries)
    return entries


def _check_budget(sweep: SweepConfig) -> None:
    budget, methods = sweep.budget, len(sweep.methods)
    if budget.trials is None and budget.hours is None and sweep.searcher != "grid":
        raise InputError(
            "section 'budget' gives neither 'trials' nor 'hours'; "
            "set one, or use 'searcher: grid', which ends by itself."
        )
    if budget.trials is not None and budget.trials < methods * budget.min_trials:
        raise InputError(
            f"key 'budget.trials' is {budget.trials} but {methods} methods with 'budget.min_trials' "
            f"{budget.min_trials} need {methods * budget.min_trials}; raise it, or include fewer methods."
        )
    cutoff = int(sweep.metric.partition("@")[2])
    if cutoff not in sweep.evaluate.ks:
        raise InputError(
            f"key 'metric' is '{sweep.metric}' but 'evaluate.ks' is {sweep.evaluate.ks}, so it is not computed; "
            f"add {cutoff}."
        )
    for published in sweep.published:
        if published.entry not in sweep.methods:
            raise InputError(
                f"key 'published' names '{published.entry}', which is not a method of the sweep; "
                f"{nearest(published.entry, list(sweep.methods))}."
            )


def _check_populations(sweep: SweepConfig, entries: dict[str, Entry]) -> None:
    if sweep.budget.min_trials < 2:
        raise InputError(
            f"key 'budget.min_trials' is {sweep.budget.min_trials} but 'scheduler: pbt' compares trials of one method; "
            "set it to at least 2, preferably to 4 or more."
        )
    populations = [entry for entry in entries.values() if entry.changeable]
    if not populations:
        raise InputError(
            "key 'scheduler' is 'pbt' but no method's space has a parameter that may change while it trains, such as "
            "'optimizer.lr'; add one, or use another scheduler."
        )
    for entry in populations:
        if "train.epochs" in entry.space:
            raise InputError(
                f"'methods.{entry.label}' searches 'train.epochs', which all trials of a population share; remove it."
            )
        if entry.interval(sweep.pbt) >= entry.base.train.epochs:
            raise InputError(
                f"key 'pbt.interval' is {sweep.pbt.interval} ({entry.interval(sweep.pbt)} epochs when rounded up to "
                f"whole evaluations), but 'methods.{entry.label}' trains {entry.base.train.epochs}; lower it, or give "
                "the method more epochs."
            )


def _entry(sweep: SweepConfig, label: str, section: EntrySection) -> Entry:
    where = f"methods.{label}"
    tree = load_file(section.config)
    space = _space(section, where)
    fixed = {**sweep.overrides, **section.overrides}
    for key in space:
        if key in fixed:
            raise InputError(
                f"'{where}' searches '{key}', which 'overrides' sets to {fixed[key]!r}; remove one of them."
            )
    if sweep.budget.epochs is not None and "train.epochs" in space:
        raise InputError(f"'{where}' searches 'train.epochs', which 'budget.epochs' limits; remove one of them.")
    tree = set_keys(tree, fixed, f"'{where}.overrides'")
    own = {
        "data": sweep.data,
        "run": {"name": label, "storage": "."},
        "train.workers": sweep.resources.workers,
        "train.cpus_per_worker": sweep.resources.cpus_per_worker,
        "train.threads": sweep.resources.threads,
        "train.metric": sweep.metric,
        "evaluate": sweep.evaluate.model_dump(),
        "tracking": TrackingSection(tensorboard=False).model_dump(),  # Ray Tune's callbacks write for all trials
    }
    try:
        base = resolve(decode(RunConfig, set_keys(tree, own, where)))
        if base.changes:
            raise InputError(
                "key 'changes' is set, but a search starts from settings that apply to a whole run; remove it."
            )
        if sweep.budget.epochs is not None and sweep.budget.epochs < base.train.epochs:
            base = base.model_copy(update={"train": base.train.model_copy(update={"epochs": sweep.budget.epochs})})
        if sweep.searcher == "grid":
            grid(space)
        entry = Entry(label, base, space)
        for key, candidates in space.items():
            tried = [candidates.low, candidates.high] if isinstance(candidates, Range) else candidates
            if isinstance(candidates, Range) and candidates.integer:
                tried = [int(value) for value in tried]
            for value in tried:
                _known(key, value, entry)
    except InputError as error:
        raise InputError(f"{where} ('{section.config}'): {error}") from None
    return entry


def _known(key: str, value: Any, entry: Entry) -> None:
    if value is None or isinstance(value, dict):
        raise InputError(f"key '{key}' has the candidate {value!r}; give plain values.")
    entry.trial([(0, {key: value})], "trial", ".", 1, False)


def _space(section: EntrySection, where: str) -> Space:
    space: Space = {}
    if section.spaces:
        path = Path(local_path(section.config, f"'{where}.config':")).with_name(SEARCH_FILE)
        shipped = load_spaces(path)
        for name in section.spaces:
            if name not in shipped:
                raise InputError(
                    f"'{where}.spaces' names '{name}', which '{path}' does not contain; {nearest(name, list(shipped))}."
                )
            for key, candidates in shipped[name].items():
                if space.get(key, candidates) != candidates and key not in section.space:
                    raise InputError(
                        f"'{where}.spaces' {section.spaces} give different candidates for '{key}'; "
                        f"give its candidates under '{where}.space'."
                    )
                space[key] = candidates
    if section.space:
        space |= parse_space(section.space, f"'{where}.space'")
    return space
