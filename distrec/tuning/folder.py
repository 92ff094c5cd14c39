"""A sweep at rest: `<run.storage>/<run.name>/` and what lies in it.

`sweep.yaml` the resolved config of the last attempt; `sweep.json` identity, attempts, dataset, methods, state;
`trials/<id>/` the search's runs and `final/<id>/` the winners' seeds, ordinary run folders with a `trial.json` beside
what `distrec.training.run_folder` writes; `winners/<method>.yaml` run configs; `graphs/` neighbour lists that trials
share; `tune/` Ray Tune's own logs. The driver alone writes `sweep.json` and every `trial.json`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from distrec.config.run import RunConfig, digest
from distrec.errors import InputError
from distrec.training.attempts import AttemptFolder, first_difference, now, to_yaml, writing_to
from distrec.training.run_folder import RunFolder
from distrec.tuning.space import Values
from distrec.tuning.sweep import Entry, SweepConfig

Status = Literal["waiting", "running", "done", "stopped", "failed"]
Phase = Literal["trials", "final"]
ERROR_FILE = "error.txt"  # written by a trial that raised, read by the driver


@dataclass(frozen=True)
class Stretch:
    """Epochs of a trial before its present settings: where they end, and the settings then."""

    until: int
    values: Values


@dataclass
class Trial:
    """One trial; `trial.json`. "stopped": by the scheduler, before its last epoch.

    With population-based training a trial that has paused is "waiting", and a clone has its donor's `past`, and the
    `number` of the trial whose place it took.
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
    pause: int | None = None  # epochs after which it pauses next; None: not before its end
    paused: int = 0  # epochs after which it paused last
    past: list[Stretch] = field(default_factory=list)
    parent: str | None = None
    born: int = 0  # epochs after which the clone began

    @property
    def settings(self) -> list[tuple[int, Values]]:
        """Its values, and after how many epochs they begin to hold."""
        return list(
            zip(
                [0, *(stretch.until for stretch in self.past)],
                [*(stretch.values for stretch in self.past), self.values],
            )
        )

    @property
    def between_stretches(self) -> bool:
        """Paused until its population has been compared."""
        return self.status == "waiting" and self.pause == self.paused

    @property
    def replaced(self) -> bool:
        """Its place is a clone's: it does not count as a trial of its own any more."""
        return self.status == "stopped" and self.pause is not None

    def finish(self, epochs: int) -> None:
        """Note that a training run of the trial came to its end after `epochs`."""
        if self.pause is not None and epochs == self.pause:
            self.status, self.paused = "waiting", epochs
        else:
            self.status = "done"

    @property
    def ended(self) -> bool:
        return self.status in ("done", "stopped", "failed")

    @property
    def finished(self) -> bool:
        """Ended with a value that selection can use."""
        return self.status in ("done", "stopped") and self.value is not None


class SweepFolder(AttemptFolder):
    """Files of one sweep."""

    record_file, config_file = "sweep.json", "sweep.yaml"

    def open_attempt(self, sweep: SweepConfig, entries: dict[str, Entry], data_hash: str) -> bool:
        """Record an attempt; returns whether the sweep is a new one.

        Raises:
            InputError: the folder holds another sweep or something else, or it cannot be written.
        """
        identity = _identity(sweep, entries, data_hash)
        with writing_to(sweep.run.storage):
            record = self._opened()
            new = record is None
            if record is None:
                if names := self.folder.names():
                    raise InputError(
                        f"'{self.folder}' holds {names[0]!r} but no sweep; choose another 'run.name', or clear it."
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
        """Every trial of a phase, by method and number; one whose record was torn has never started."""
        out = []
        for name in self.folder.names(phase):
            try:
                record = self.folder.read_json(phase, name, "trial.json")
            except (OSError, ValueError):
                continue
            known = {field.name for field in fields(Trial)}
            trial = Trial(**{key: value for key, value in record.items() if key in known})
            trial.past = [Stretch(**stretch) for stretch in record.get("past", [])]
            out.append(trial)
        return sorted(out, key=lambda trial: (trial.entry, trial.number, trial.born))

    def write_trial(self, phase: Phase, trial: Trial) -> None:
        """Write a trial's record."""
        self.folder.write_json(asdict(trial), phase, trial.id, "trial.json")

    def run(self, phase: Phase, trial: Trial) -> RunFolder:
        """The run folder of a trial."""
        return RunFolder(self.folder.folder(phase, trial.id))

    def error(self, phase: Phase, trial: Trial) -> str | None:
        """The last error that the trial raised, where it could still write it: one line."""
        if not self.folder.exists(phase, trial.id, ERROR_FILE):
            return None
        lines = self.folder.read_bytes(phase, trial.id, ERROR_FILE).decode().strip().splitlines()
        return lines[-1] if lines else None

    def read_result(self, phase: Phase, trial: Trial, metric: str) -> None:
        """Bring a trial that another attempt left unended up to what its run folder says."""
        run = self.run(phase, trial)
        trial.status = "waiting"
        values = [record["valid"][metric] for record in run.read_metrics() if "valid" in record]
        trial.last = values[-1] if values else None
        if run.folder.exists("summary.json"):
            summary = run.folder.read_json("summary.json")
            values.append(summary["valid"][metric])
            of_pause = trial.paused and summary["epochs"] <= trial.paused  # written then: not this stretch's
            if not of_pause and (phase == "trials" or run.folder.exists("evaluation", "test.json")):
                trial.finish(summary["epochs"])
        trial.value = max(values, default=None)

    def clone(self, loser: Trial, clone: Trial) -> None:
        """Put a clone of another trial, with that one's checkpoints, in the place of `loser`. Can be done again."""
        assert clone.parent is not None
        donor, target = self.folder.folder("trials", clone.parent), self.folder.folder("trials", clone.id)
        target.remove()
        target.make()
        for name in ("checkpoints", "metrics.jsonl"):
            donor.copy(target, name)
        if donor.exists("run.json"):
            record = donor.read_json("run.json")
            target.write_json({**record, "attempts": []}, "run.json")
        self.write_trial("trials", clone)  # from here on the place is the clone's
        self.replace(loser)

    def replace(self, trial: Trial) -> None:
        """Note that a trial's place is a clone's."""
        trial.status = "stopped"
        self.write_trial("trials", trial)

    def write_winners(self, winners: dict[str, str], configs: dict[str, RunConfig]) -> None:
        """Note each method's winner and write its run config, ready to run."""
        for label, config in configs.items():
            self.folder.write_bytes(to_yaml(config), "winners", f"{label}.yaml")
        self.update_record(winners=winners, closed=now())

    def prune(self, trials: Iterable[Trial]) -> None:
        """Delete the checkpoints of every finished or failed trial but each method's best so far."""
        trials = list(trials)
        best = best_trials(trials)
        for trial in trials:
            if trial.ended and best.get(trial.entry) != trial.id:
                self.folder.remove("trials", trial.id, "checkpoints")


def in_place(trials: Iterable[Trial]) -> list[Trial]:
    """Without those whose place is a clone's: as many as were begun afresh."""
    return [trial for trial in trials if not trial.replaced]


def best_trials(trials: Iterable[Trial]) -> dict[str, str]:
    """Each method's best trial by validation value; of equal ones the earliest. Methods without a finished trial lack.

    A clone has its donor's best value where it did not find a better one, and is later than any donor.
    """
    best: dict[str, Trial] = {}
    for trial in sorted(trials, key=lambda trial: (trial.born, trial.number)):
        if trial.finished:
            leader = best.get(trial.entry)
            if leader is None or (trial.value or 0.0) > (leader.value or 0.0):
                best[trial.entry] = trial
    return {label: trial.id for label, trial in best.items()}


def _identity(sweep: SweepConfig, entries: dict[str, Entry], data_hash: str) -> dict[str, Any]:
    """What makes two attempts the same sweep. Budget, seeds, resources and retries may change between them."""
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
