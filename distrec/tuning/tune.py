"""`distrec tune SWEEP`: run a sweep config up to the winners' test results. The same command again continues a sweep.

1. Check the config, and make the dataset if section `prepare` says how.
2. Search: `plan` chooses trials, `execute` runs them, and only the validation split judges them. At the end of the
   search, each method's winner is written to the folder and never changes again.
3. Train each winner with new seeds. Only now is the test split read.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distrec.cluster.capacity import Ask, current_offer, fitting, wait_for
from distrec.cluster.connection import ray_cluster
from distrec.config.run import RunConfig
from distrec.data.dataset import Dataset
from distrec.data.storage import open_folder
from distrec.errors import InputError
from distrec.runtime import WORKER_ENVIRONMENT, check_stack, quiet, versions
from distrec.training.attempts import now, with_absolute_paths
from distrec.training.hold import Hold
from distrec.training.launch import check_features, check_inputs
from distrec.tuning.entries import Entry, resolve_entries
from distrec.tuning.folder import SweepFolder, Trial, best_trials, in_place
from distrec.tuning.live import Live
from distrec.tuning.plan import Next, Plan, require_optuna
from distrec.tuning.population import Population
from distrec.tuning.sweep import PrepareSection, SweepConfig, load_sweep


def tune(config: SweepConfig | str | Path, overrides: Sequence[str] = ()) -> SweepFolder:
    """Run a sweep, or continue it, and return its folder.

    Args:
        config: a sweep config, or the path of its YAML file.
        overrides: `dotted.key=value` settings, applied to a file.

    Raises:
        InputError: the config or the data is invalid, or another attempt runs the sweep (raised before any trial
            starts), or no trial gave a result.
        Interrupted: Ctrl-C or SIGTERM stopped the sweep after the running trials saved checkpoints.
    """
    check_stack()
    quiet()
    sweep = with_absolute_paths(config if isinstance(config, SweepConfig) else load_sweep(config, overrides))
    if sweep.searcher == "tpe":
        require_optuna()
    entries, folder = resolve_entries(sweep), SweepFolder.of(sweep)
    with Hold(folder.folder, "sweep", sweep.run.storage) as hold:
        if sweep.prepare is not None:
            prepare_data(sweep.prepare, sweep.data)
        data = Dataset.open(sweep.data)
        described = _check_data(entries, data)
        with ray_cluster({"env_vars": WORKER_ENVIRONMENT}) as fixed:
            cpus, concurrent = _concurrent(sweep, fixed)
            new = folder.open_attempt(sweep, entries, data.hash)
            folder.update_record(
                data=_about(data), entries=described, versions=versions(), cpus=cpus,
                published=[section.model_dump() for section in sweep.published],
            )  # fmt: skip
            folder.hold = hold
            with hold.holding():  # what Ray Tune makes of a lost hold would not say so
                Search(sweep, entries, folder, concurrent, new).run()
    return folder


def prepare_data(section: PrepareSection, out: str) -> None:
    """Make the dataset at `out`: prepare it and encode its content, except for the parts that exist already."""
    from distrec.data.demo import write_demo
    from distrec.data.prepare import prepare
    from distrec.encoders.encode import encode

    if not open_folder(out).exists("manifest.json"):
        with tempfile.TemporaryDirectory() as shop:
            if section.source == "demo":
                print("generating the demo shop", flush=True)
                write_demo(shop)
            prepare(section.config, shop if section.source == "demo" else section.source, out)
    manifest = Dataset.open(out).manifest
    content = [name for name, items in manifest.content.items() if items]
    if any(name not in manifest.features for name in content):
        encode(out)
    if section.tokens and any(f"{name}-tokens" not in manifest.features for name in content):
        encode(out, tokens=True, image_pool=section.image_pool)


def _check_data(entries: dict[str, Entry], data: Dataset) -> dict[str, Any]:
    """Check every method with the data; return the value of `entries` in `sweep.json`."""
    described, features = {}, dict[str, None]()
    for label, entry in entries.items():
        try:
            method = check_inputs(entry.base, data).method
        except InputError as error:
            raise InputError(f"methods.{label}: {error}") from None
        described[label] = {
            "title": method.title(),
            "method": entry.base.method["name"],
            "reads_content": bool(method.features()),
        }
        features |= dict.fromkeys(method.features())
    check_features(data, features)
    return described


def _concurrent(sweep: SweepConfig, fixed: bool) -> tuple[float, int]:
    """The number of CPUs of the cluster, and how many trials can run at once, after the cluster has room for one.

    Args:
        sweep: the sweep config.
        fixed: whether no other host can join the cluster.

    Raises:
        InputError: the cluster has too few CPUs for one trial.
    """
    resources = sweep.resources
    workers, cpus = max(resources.workers, 1), resources.cpus_per_worker
    ask = Ask(
        workers, workers, cpus, f"section 'resources' asks for {workers} times {cpus:g} CPUs per trial",
        "lower 'workers' or 'cpus_per_worker'",
    )  # fmt: skip
    wait_for(ask, resources.wait_for_cluster, fixed)
    hosts = current_offer(fixed).total
    return sum(hosts), fitting(cpus, hosts) // workers


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
    """The two phases of a sweep: the search, and the winners' training with new seeds.

    Args:
        sweep: the sweep config.
        entries: its methods, by label.
        folder: the sweep's folder.
        concurrent: how many trials can run at once.
        new: whether the folder is new, so that it has no trials to read.
    """

    def __init__(self, sweep: SweepConfig, entries: dict[str, Entry], folder: SweepFolder, concurrent: int, new: bool):
        self.sweep, self.entries, self.folder, self.concurrent = sweep, entries, folder, concurrent
        self.plan = Plan(sweep, {label: entry.space for label, entry in entries.items()})
        self.trials: list[Trial] = [] if new else self._read("trials")
        self.waiting = [trial for trial in self.trials if not trial.ended and not trial.between_stretches]
        self.populations = _populations(sweep, entries)
        self.before = folder.record["seconds"]
        self.started = time.monotonic()

    def run(self) -> None:
        """Search, fix the winners, and train them with new seeds; skip what earlier attempts have done."""
        with Live(self.sweep, self.folder) as live:
            if self.folder.record["closed"] is None:
                live.phase("trials", self.plan.total(), self.trials)
                self._execute("trials", self._next)
                self._close()
            else:
                self.folder.mend_winners(self._winner_configs(self._winners()))
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
        # A clone comes after the trial that it replaces.
        newest = {(trial.entry, trial.number): trial for trial in trials}
        for trial in trials:
            if not trial.ended and newest[trial.entry, trial.number] is not trial:
                self.folder.replace(trial)
        return trials

    def _next(self) -> Next:
        """The next trial to run, with its config.

        Trials that an earlier attempt left unfinished come first, then those that a population continues or the plan
        starts.

        Returns:
            The trial and its config; "later" if a running trial must pause first; None if there are no more trials.
        """
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
        """Start a new trial; None if the plan has no more, or the time is over."""
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
        """A paused trial that its population continues, or None.

        `closed` says that no new trial will start, so every population is complete.
        """
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
        """Whether each method has its minimum number of trials. The time limit ends the search only after that."""
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
        """Duration of the search in seconds, summed over all attempts."""
        return float(self.before + time.monotonic() - self.started)

    def _ended(self, trial: Trial) -> None:
        if self.folder.record["closed"] is None:
            self.folder.update_record(seconds=self.seconds)
            self.folder.prune(self.trials)

    def _close(self) -> None:
        """Choose the winners by validation and end the search for good.

        Raises:
            InputError: no trial has a result.
        """
        winners = best_trials(self.trials)
        if not winners:
            reasons = sorted({trial.reason for trial in self.trials if trial.reason})
            raise InputError(
                f"no trial of the sweep '{self.folder.folder}' ended with a result; the first reason: "
                f"{reasons[0] if reasons else 'none was started'}"
            )
        self.folder.write_winners(winners, self._winner_configs(winners))

    def _winner_configs(self, winners: dict[str, str]) -> dict[str, RunConfig]:
        by_id = {trial.id: trial for trial in self.trials}
        return {
            label: self.entries[label].trial(
                by_id[name].settings, f"{label}-winner", self.sweep.run.storage, self.sweep.seed, True
            )
            for label, name in winners.items()
        }

    def _winners(self) -> dict[str, str]:
        """The winners that the search has chosen, by method.

        Raises:
            InputError: `sweep.json` names a method or trial that the sweep does not have.
        """
        winners: dict[str, str] = self.folder.record["winners"]
        ids = {trial.id for trial in self.trials}
        for label, name in winners.items():
            if label not in self.entries or name not in ids:
                raise InputError(
                    f"'{self.folder.folder.folder('sweep.json')}' names trial '{name}' as the winner of '{label}', but "
                    f"'{self.folder.folder.folder('trials')}' has no such trial; restore the folder, or choose another "
                    "'run.name'."
                )
        return winners

    def _finals(self) -> list[Trial]:
        """One trial per winner and seed, existing or new.

        Methods take turns, so that a report made before the end already has all of them.
        """
        known = {trial.id: trial for trial in self._read("final")}
        winners = {trial.id: trial for trial in self._read("trials")}
        out = []
        for number in range(self.sweep.seeds):
            for label, name in self._winners().items():
                seed = self.sweep.seed + 1 + number
                final = f"{label}-seed{seed}"
                winner = winners[name]
                fresh = Trial(final, label, number, winner.values, winner.cpus, seed, past=winner.past)
                out.append(known.get(final) or fresh)
        return out


def _populations(sweep: SweepConfig, entries: dict[str, Entry]) -> dict[str, Population]:
    """The populations of the methods whose spaces have a parameter that may change while a run trains."""
    if sweep.scheduler != "pbt":
        return {}
    found = {label: Population.of(entry, sweep.pbt, sweep.seed) for label, entry in entries.items()}
    for label, population in found.items():
        if population is None:
            print(f"{label}: no parameter of its space may change while a run trains, so its trials are not compared")
    return {label: population for label, population in found.items() if population is not None}
