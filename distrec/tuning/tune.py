"""`distrec tune SWEEP`: from a sweep config to the winners' results; the same command again continues.

1. Everything is checked, and the dataset made where `prepare` says how.
2. The search: trials chosen by `plan`, run by `execute`, seen on validation only. At its end each method's winner is
   fixed in the folder.
3. Each winner is trained with fresh seeds, and then, for the first time, the test split is read.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distrec.config.run import RunConfig
from distrec.data.dataset import Dataset
from distrec.data.storage import open_folder
from distrec.errors import InputError
from distrec.runtime import WORKER_ENVIRONMENT, check_stack, quiet, ray_cluster, versions
from distrec.training.attempts import now, with_absolute_paths
from distrec.training.launch import check_inputs
from distrec.tuning.folder import SweepFolder, Trial, best_trials, in_place
from distrec.tuning.live import Live
from distrec.tuning.plan import Next, Plan, require_optuna
from distrec.tuning.population import Population
from distrec.tuning.sweep import Entry, PrepareSection, SweepConfig, load_sweep, resolve_entries


def tune(config: SweepConfig | str | Path, overrides: Sequence[str] = ()) -> SweepFolder:
    """Run a sweep, or continue it, and return its folder.

    Args:
        config: a sweep config, or the path of its YAML file.
        overrides: `dotted.key=value` settings, applied to a file.

    Raises:
        InputError: bad input, before any trial starts.
        Interrupted: Ctrl-C or SIGTERM; running trials saved checkpoints.
    """
    check_stack()
    quiet()
    sweep = with_absolute_paths(config if isinstance(config, SweepConfig) else load_sweep(config, overrides))
    if sweep.searcher == "tpe":
        require_optuna()
    entries = resolve_entries(sweep)
    if sweep.prepare is not None:
        prepare_data(sweep.prepare, sweep.data)
    described = _check_data(entries)
    data = Dataset.open(sweep.data)
    folder = SweepFolder.of(sweep)
    with ray_cluster({"env_vars": WORKER_ENVIRONMENT}):
        cpus, concurrent = _concurrent(sweep)
        new = folder.open_attempt(sweep, entries, data.hash)
        folder.update_record(
            data=_about(data), entries=described, versions=versions(), cpus=cpus,
            published=[section.model_dump() for section in sweep.published],
        )  # fmt: skip
        Search(sweep, entries, folder, concurrent, new).run()
    return folder


def prepare_data(section: PrepareSection, out: str) -> None:
    """Make the dataset at `out` as far as it is not there: prepare, then encode what content it has."""
    from distrec.data.demo import write_demo
    from distrec.data.prepare import prepare
    from distrec.encoders.encode import encode

    if not open_folder(out).exists("manifest.json"):
        with tempfile.TemporaryDirectory() as shop:
            if section.source == "demo":
                print("making the demo shop", flush=True)
                write_demo(shop)
            prepare(section.config, shop if section.source == "demo" else section.source, out)
    manifest = Dataset.open(out).manifest
    content = [name for name, items in manifest.content.items() if items]
    if any(name not in manifest.features for name in content):
        encode(out)
    if section.tokens and any(f"{name}-tokens" not in manifest.features for name in content):
        encode(out, tokens=True, image_pool=section.image_pool)


def _check_data(entries: dict[str, Entry]) -> dict[str, Any]:
    """Every method looked at with the data; returns `entries` of `sweep.json`."""
    described = {}
    for label, entry in entries.items():
        try:
            _, method, _ = check_inputs(entry.base)
        except InputError as error:
            raise InputError(f"methods.{label}: {error}") from None
        described[label] = {
            "title": method.title(),
            "method": entry.base.method["name"],
            "reads_content": bool(method.features()),
        }
    return described


def _concurrent(sweep: SweepConfig) -> tuple[float, int]:
    """The cluster's CPUs, and how many trials they hold at once.

    Raises:
        InputError: not even one.
    """
    import ray

    resources = sweep.resources
    offered, asked = ray.cluster_resources().get("CPU", 0), max(resources.workers, 1) * resources.cpus_per_worker
    if asked > offered:
        raise InputError(
            f"section 'resources' asks for {asked:g} CPUs per trial, but the cluster offers {offered:g}; lower "
            "'workers' or 'cpus_per_worker', or add nodes."
        )
    return offered, int(offered // asked)


def _about(data: Dataset) -> dict[str, Any]:
    manifest = data.manifest
    return {
        "name": manifest.name,
        "users": data.users,
        "items": data.items,
        "interactions": dict(manifest.interactions),
        "split": manifest.split,
        "hash": data.hash,
    }


class Search:
    """The two phases over one folder."""

    def __init__(self, sweep: SweepConfig, entries: dict[str, Entry], folder: SweepFolder, concurrent: int, new: bool):
        self.sweep, self.entries, self.folder, self.concurrent = sweep, entries, folder, concurrent
        self.plan = Plan(sweep, {label: entry.space for label, entry in entries.items()})
        self.trials: list[Trial] = [] if new else self._read("trials")
        self.waiting = [trial for trial in self.trials if not trial.ended and not trial.between_stretches]
        self.populations = _populations(sweep, entries)
        self.before = folder.record["seconds"]
        self.started = time.monotonic()

    def run(self) -> None:
        """Search, choose, and train the winners' seeds, as far as that is not done."""
        with Live(self.sweep, self.folder) as live:
            if self.folder.record["closed"] is None:
                live.phase("trials", self.plan.total(), self.trials)
                self._execute("trials", self._next)
                self._close()
            finals = self._finals()
            live.phase("final", len(finals), finals)
            left = [trial for trial in finals if not trial.ended]
            if left:
                self._execute("final", lambda: self._take(left))
                self.folder.update_record(done=now())

    def _execute(self, phase: Any, source: Any) -> None:
        from distrec.tuning.execute import Execution

        Execution(self.sweep, self.folder, phase, source, self.concurrent, self._ended).run()

    def _read(self, phase: Any) -> list[Trial]:
        trials = self.folder.trials(phase)
        for trial in trials:
            if not trial.ended:
                before = asdict(trial)
                self.folder.read_result(phase, trial, self.sweep.metric)
                if asdict(trial) != before:
                    self.folder.write_trial(phase, trial)
        newest = {(trial.entry, trial.number): trial for trial in trials}  # clones come after whom they replace
        for trial in trials:
            if not trial.ended and newest[trial.entry, trial.number] is not trial:
                self.folder.replace(trial)
        return trials

    def _next(self) -> Next:
        """First what an earlier attempt left unended, then what populations or the plan say, while there is time."""
        trial = (
            self.waiting.pop(0)
            if self.waiting
            else (self._advanced(closed=False) or self._begun() or self._advanced(closed=True))
        )
        if trial is None:
            running = any(trial.status == "running" for trial in self.trials)
            return "later" if self.populations and running else None
        return trial, self._config("trials", trial)

    def _begun(self) -> Trial | None:
        """A new trial."""
        hours = self.sweep.budget.hours
        if hours is not None and self.seconds >= hours * 3600 and self._all_begun():
            return None
        trial = self.plan.next_trial(self.trials)
        if trial is not None:
            self.trials.append(trial)
            if trial.entry in self.populations:
                trial.pause = self.populations[trial.entry].next_pause(trial)
        return trial

    def _advanced(self, *, closed: bool) -> Trial | None:
        """A paused trial of a population that goes on; `closed`: no trial will join any more, so all are complete."""
        size = self.sweep.budget.min_trials
        groups: dict[tuple[str, int], list[Trial]] = {}
        for trial in self.trials:
            if trial.entry in self.populations:
                groups.setdefault((trial.entry, trial.number // size), []).append(trial)
        for (label, _), members in groups.items():
            population = self.populations[label]
            if not closed and len(in_place(members)) < min(size, self.plan.points(label)):
                continue
            step = population.step(members)
            if isinstance(step, list):
                for loser, clone in step:
                    self.folder.clone(loser, clone)
                    self.trials.append(clone)
                    members.append(clone)
                step = population.step(members)
            if isinstance(step, Trial):
                step.pause = population.next_pause(step)
                return step
        return None

    def _all_begun(self) -> bool:
        """Whether each method has had its minimum; the time cannot be so short that a method is left out."""
        count = {label: sum(t.entry == label for t in in_place(self.trials)) for label in self.entries}
        least = self.sweep.budget.min_trials
        return all(count[label] >= min(least, self.plan.points(label)) for label in self.entries)

    def _take(self, left: list[Trial]) -> Next:
        if not left:
            return None
        trial = left.pop(0)
        return trial, self._config("final", trial)

    def _config(self, phase: str, trial: Trial) -> RunConfig:
        folder = self.folder.folder
        storage, graphs = str(folder.folder(phase)), str(folder.folder("graphs"))
        return self.entries[trial.entry].trial(
            trial.settings, trial.id, storage, trial.seed, phase == "final", graphs, trial.pause
        )

    @property
    def seconds(self) -> float:
        """How long the search has taken over all attempts."""
        return float(self.before + time.monotonic() - self.started)

    def _ended(self, trial: Trial) -> None:
        if self.folder.record["closed"] is None:
            self.folder.update_record(seconds=self.seconds)
            self.folder.prune(self.trials)

    def _close(self) -> None:
        """Fix the winners by validation; from here on the search does not go on."""
        winners = best_trials(self.trials)
        if not winners:
            reasons = sorted({trial.reason for trial in self.trials if trial.reason})
            raise InputError(
                f"no trial of the sweep '{self.folder.folder}' ended with a result; the first reason: "
                f"{reasons[0] if reasons else 'none was started'}"
            )
        by_id = {trial.id: trial for trial in self.trials}
        configs = {
            label: self.entries[label].trial(
                by_id[name].settings, f"{label}-winner", self.sweep.run.storage, self.sweep.seed, True
            )
            for label, name in winners.items()
        }
        self.folder.write_winners(winners, configs)

    def _finals(self) -> list[Trial]:
        """Every winner's seeds, as far as they stand; the methods take turns, so an early report has all of them."""
        known = {trial.id: trial for trial in self._read("final")}
        winners = {trial.id: trial for trial in self._read("trials")}
        out = []
        for number in range(self.sweep.seeds):
            for label, name in self.folder.record["winners"].items():
                seed = self.sweep.seed + 1 + number
                final = f"{label}-seed{seed}"
                winner = winners[name]
                fresh = Trial(final, label, number, winner.values, winner.cpus, seed, past=winner.past)
                out.append(known.get(final) or fresh)
        return out


def _populations(sweep: SweepConfig, entries: dict[str, Entry]) -> dict[str, Population]:
    """Of those methods whose spaces have parameters that may change while a run trains."""
    if sweep.scheduler != "pbt":
        return {}
    found = {label: Population.of(entry, sweep.pbt, sweep.seed) for label, entry in entries.items()}
    for label, population in found.items():
        if population is None:
            print(f"{label}: no parameter of its space may change while it trains, so its trials are not compared")
    return {label: population for label, population in found.items() if population is not None}
