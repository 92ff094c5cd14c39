"""The folder of a sweep, `<run.storage>/<run.name>/`, and its files (docs/data.md section 6).

* `sweep.yaml`: the resolved config of the last attempt.
* `sweep.json`: identity, attempts, dataset, methods, state.
* `trials/<id>/`: the runs of the search; `final/<id>/`: the winners' runs with new seeds. Both are run folders as
  `distrec.training.run_folder` writes them, with an additional `trial.json`.
* `winners/<method>.yaml`: run configs.
* `graphs/`: neighbour lists that trials share.
* `tune/`: Ray Tune's own logs.
* `holder-NNNNNN.json`: while an attempt runs; see `distrec.training.hold`. Trials have none: their sweep holds them.

Only the driver writes `sweep.json` and `trial.json`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from pydantic import Field

from distrec.config.run import RunConfig, digest
from distrec.config.text import read_yaml
from distrec.config.tree import decode
from distrec.errors import InputError, StorageError
from distrec.training.attempts import (
    AttemptFolder,
    Identity,
    Record,
    first_difference,
    now,
    read_record,
    to_yaml,
    writing_to,
)
from distrec.training.hold import Hold, holders
from distrec.training.run_folder import RunFolder
from distrec.tuning.entries import Entry
from distrec.tuning.space import Values
from distrec.tuning.sweep import SweepConfig

Status = Literal["waiting", "running", "done", "stopped", "failed"]
Phase = Literal["trials", "final"]
ERROR_FILE = "error.txt"  # a trial that raises an error writes it, the driver reads it


@dataclass(frozen=True)
class Stretch:
    """Earlier epochs of a trial that used other settings.

    Attributes:
        until: number of epochs after which these settings ended.
        values: the settings.
    """

    until: int
    values: Values


@dataclass
class Trial:
    """One trial, as in `trial.json`. Status "stopped" means that the scheduler stopped it before its last epoch.

    With population-based training, a paused trial is "waiting". A clone has the `past` of its donor and the `number` of
    the trial that it replaced.
    """

    id: str
    entry: str
    number: int
    values: Values
    cpus: float
    seed: int
    status: Status = "waiting"
    value: float | None = None  # best validation metric so far
    reason: str | None = None
    failures: int = 0
    seconds: float = 0.0
    last: float | None = None  # newest validation metric
    pause: int | None = None  # number of epochs after which it pauses next; None: it does not pause
    paused: int = 0  # number of epochs after which it paused last
    past: list[Stretch] = field(default_factory=list)
    parent: str | None = None
    born: int = 0  # number of epochs after which the clone started

    @property
    def settings(self) -> list[tuple[int, Values]]:
        """All settings of the trial in order: the number of epochs after which they apply, and their values."""
        return list(
            zip(
                [0, *(stretch.until for stretch in self.past)],
                [*(stretch.values for stretch in self.past), self.values],
            )
        )

    @property
    def between_stretches(self) -> bool:
        """Whether the trial is paused until the trials of its population have been compared."""
        return self.status == "waiting" and self.pause == self.paused

    @property
    def replaced(self) -> bool:
        """Whether a clone replaced the trial, which then no longer counts as a trial of its own."""
        return self.status == "stopped" and self.pause is not None

    def finish(self, epochs: int) -> None:
        """Set the status after a training run of the trial that ended after `epochs` epochs."""
        if self.pause is not None and epochs == self.pause:
            self.status, self.paused = "waiting", epochs
        else:
            self.status = "done"

    @property
    def ended(self) -> bool:
        return self.status in ("done", "stopped", "failed")

    @property
    def finished(self) -> bool:
        """Whether the trial ended with a value that selection can use."""
        return self.status in ("done", "stopped") and self.value is not None


class _SweepRecord(Record):
    identity: Identity
    attempts: list[dict[str, Any]]
    seconds: float
    closed: str | None
    winners: dict[str, str] = Field({})


class SweepFolder(AttemptFolder):
    """The folder of one sweep.

    Attributes:
        hold: the hold on the folder, which every change requires; None: nobody else can run the sweep.
    """

    what, record_file, record_shape, config_file = "sweep", "sweep.json", _SweepRecord, "sweep.yaml"
    files = ("sweep.json", "sweep.yaml", "report.html", "report.md", "report.json")
    folders = ("trials", "final", "winners", "graphs", "tune")
    hold: Hold | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "hold": None}  # Ray Tune pickles what it calls; a copy holds nothing

    def _require_hold(self) -> None:
        if self.hold is not None:
            self.hold.require()

    def update_record(self, **fields: Any) -> None:
        self._require_hold()
        super().update_record(**fields)

    def open_attempt(self, sweep: SweepConfig, entries: dict[str, Entry], data_hash: str) -> bool:
        """Record a new attempt; return whether the sweep is new.

        Raises:
            InputError: the folder holds another sweep, a damaged record or other files, or it cannot be written.
        """
        identity = _identity(sweep, entries, data_hash)
        with writing_to(sweep.run.storage):
            self.check_kinds()
            record = self._opened()
            new = record is None
            if record is None:
                if names := sorted({*self.folder.names()} - {*holders(self.folder)}):
                    raise InputError(
                        f"'{self.folder}' holds {names[0]!r} but no sweep; choose another 'run.name', or empty the "
                        "folder."
                    )
                record = {"identity": identity, "attempts": [], "seconds": 0.0, "closed": None, "done": None}
            else:
                self._check(record["identity"], identity)
            self._write_attempt(sweep, record, resources=sweep.resources.model_dump())
        return new

    def _check(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        if difference := first_difference(old, new):
            key, before, value = difference
            raise InputError(
                f"'{self.folder}' holds another sweep: {key} is {before!r} there, now {value!r}; "
                "choose another 'run.name', restore the value, or delete the folder."
            )

    def trials(self, phase: Phase) -> list[Trial]:
        """All trials of a phase, by method and number. A trial without a record never started, so it is left out.

        Raises:
            InputError: the record of a trial is damaged.
        """
        out = []
        for name in self.folder.names(phase):
            if self.folder.exists(phase, name, "trial.json"):
                remedy = f"delete '{self.folder.folder(phase, name)}', so that the sweep trains it again"
                record = read_record(self.folder, Trial, phase, name, "trial.json", remedy=remedy)
                known = {field.name for field in fields(Trial)}
                trial = Trial(**{key: value for key, value in record.items() if key in known})
                trial.past = [Stretch(**stretch) for stretch in record.get("past", [])]
                out.append(trial)
        return sorted(out, key=lambda trial: (trial.entry, trial.number, trial.born))

    def write_trial(self, phase: Phase, trial: Trial) -> None:
        """Write a trial's record."""
        self._require_hold()
        self.folder.write_json(asdict(trial), phase, trial.id, "trial.json")

    def run(self, phase: Phase, trial: Trial) -> RunFolder:
        """The run folder of a trial."""
        return RunFolder(self.folder.folder(phase, trial.id))

    def error(self, phase: Phase, trial: Trial) -> str | None:
        """The last line of the error that the trial raised and wrote; None if it wrote none."""
        if not self.folder.exists(phase, trial.id, ERROR_FILE):
            return None
        lines = self.folder.read_bytes(phase, trial.id, ERROR_FILE).decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else None

    def read_result(self, phase: Phase, trial: Trial, metric: str) -> None:
        """Update a trial that an earlier attempt left unfinished from its run folder."""
        run = self.run(phase, trial)
        trial.status = "waiting"
        values = [record["valid"][metric] for record in run.read_metrics() if metric in record.get("valid", {})]
        trial.last = values[-1] if values else None
        try:
            summary = run.summary()
        except StorageError:
            raise
        except InputError:  # none yet, or a damaged one, which the trial writes anew
            summary = {"valid": {}}
        if metric in summary["valid"]:
            values.append(summary["valid"][metric])
            of_pause = trial.paused and summary["epochs"] <= trial.paused  # written at the pause, not in this stretch
            if not of_pause and (phase == "trials" or run.folder.exists("evaluation", "test.json")):
                trial.finish(summary["epochs"])
        trial.value = max(values, default=None)

    def clone(self, loser: Trial, clone: Trial) -> None:
        """Replace trial `loser` by `clone`, which gets its parent's checkpoints. Safe to repeat after a crash."""
        assert clone.parent is not None
        self._require_hold()
        donor, target = self.folder.folder("trials", clone.parent), self.folder.folder("trials", clone.id)
        target.remove()
        target.make()
        for name in ("checkpoints", "metrics.jsonl"):
            donor.copy(target, name)
        if donor.exists("run.json"):
            target.write_json({**RunFolder(donor).record, "attempts": []}, "run.json")
        self.write_trial("trials", clone)  # from here on the clone replaces `loser`, even if we crash
        self.replace(loser)

    def replace(self, trial: Trial) -> None:
        """Record that a clone replaced a trial."""
        trial.status = "stopped"
        self.write_trial("trials", trial)

    def write_winners(self, winners: dict[str, str], configs: dict[str, RunConfig]) -> None:
        """Record each method's winner and write its run config for `distrec train`."""
        for label, config in configs.items():
            self.folder.write_bytes(to_yaml(config), "winners", f"{label}.yaml")
        self.update_record(winners=winners, closed=now())

    def mend_winners(self, configs: dict[str, RunConfig]) -> None:
        """Write again, and name, each winner's run config that is absent or damaged."""
        for label, config in configs.items():
            name = f"{label}.yaml"
            try:
                decode(RunConfig, read_yaml(self.folder.read_bytes("winners", name), name))
            except (OSError, InputError):
                print(f"'{self.folder.folder('winners', name)}' was absent or damaged: it is written again", flush=True)
                self.folder.remove("winners", name)
                self.folder.write_bytes(to_yaml(config), "winners", name)

    def prune(self, trials: Iterable[Trial]) -> None:
        """Delete the checkpoints of all trials that ended, except those of each method's best one so far."""
        trials = list(trials)
        best = best_trials(trials)
        for trial in trials:
            if trial.ended and best.get(trial.entry) != trial.id:
                self.folder.remove("trials", trial.id, "checkpoints")


def in_place(trials: Iterable[Trial]) -> list[Trial]:
    """The trials without those that a clone replaced; there are as many as the plan started."""
    return [trial for trial in trials if not trial.replaced]


def best_trials(trials: Iterable[Trial]) -> dict[str, str]:
    """The id of each method's best trial by validation value, by method; among equal ones, the earliest.

    Methods without a finished trial are left out. A clone that finds no better value has its donor's value, so the
    donor, being earlier, wins.
    """
    best: dict[str, Trial] = {}
    for trial in sorted(trials, key=lambda trial: (trial.born, trial.number)):
        if trial.finished:
            leader = best.get(trial.entry)
            if leader is None or (trial.value or 0.0) > (leader.value or 0.0):
                best[trial.entry] = trial
    return {label: trial.id for label, trial in best.items()}


def _identity(sweep: SweepConfig, entries: dict[str, Entry], data_hash: str) -> dict[str, Any]:
    """The settings that all attempts of a sweep share. Budget, seeds, resources and retries may change."""
    return {
        "data": data_hash,
        "metric": sweep.metric,
        "evaluate": {"mask": sweep.evaluate.mask, "ks": sweep.evaluate.ks},
        "seed": sweep.seed,
        "searcher": sweep.searcher,
        "scheduler": sweep.scheduler,
        "asha": sweep.asha.model_dump() if sweep.scheduler == "asha" else None,
        "pbt": {**sweep.pbt.model_dump(), "population": sweep.budget.min_trials} if sweep.scheduler == "pbt" else None,
        "methods": {label: _entry_identity(entry, data_hash) for label, entry in entries.items()},
    }


def _entry_identity(entry: Entry, data_hash: str) -> dict[str, Any]:
    train = entry.base.train
    return {
        **entry.base.identity(data_hash),
        "train.epochs": train.epochs,
        "train.patience": train.patience,
        "train.eval_every": train.eval_every,
        "space": digest({key: repr(candidates) for key, candidates in entry.space.items()}),
    }
