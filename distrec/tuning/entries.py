"""The methods of a sweep, resolved: the run config of every trial, and the space that it is chosen from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrec.config.paths import local_path
from distrec.config.run import RunConfig, TrackingSection
from distrec.config.tree import decode, load_file, nearest, set_keys
from distrec.errors import InputError
from distrec.methods.registry import changeable, resolve
from distrec.tuning.space import Range, Space, Values, grid, load_spaces, parse_space
from distrec.tuning.sweep import EntrySection, PbtSection, SweepConfig

SEARCH_FILE = "search.yaml"


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
        "train.wait_for_cluster": sweep.resources.wait_for_cluster,
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
