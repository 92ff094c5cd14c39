"""The folder of a run, `<run.storage>/<run.name>/`, and its files (docs/data.md section 5).

* `config.yaml`: the resolved config of the last attempt.
* `run.json`: identity, attempts, plan, versions, degradations.
* `metrics.jsonl`: one object per epoch; steps that a crash undid leave no trace.
* `progress.json`: the current epoch and step.
* `summary.json`: the best epoch, and its metrics.
* `checkpoints/`, `evaluation/`, `tensorboard/`.
* `holder-NNNNNN.json`: while an attempt runs; see `distrec.training.hold`.
"""

from __future__ import annotations

import json
import os
import re
import time
from typing import Any

from pydantic import Field

from distrec.config.run import RunConfig, digest
from distrec.config.text import read_yaml
from distrec.config.tree import decode
from distrec.data.storage import Folder, open_folder
from distrec.errors import InputError
from distrec.training.attempts import (
    AttemptFolder,
    Identity,
    Record,
    checked,
    first_difference,
    now,
    read_record,
    writing_to,
)

STOP_REQUEST = "stop-request"
_KILLED = "killed"  # the outcome of an attempt whose driver, or its machine, was gone before it could say more
_REMOTE_SECONDS = 5.0
_CHECKPOINT = r"epoch-([0-9]{6})-step-([0-9]{9})"


class TakenOver(InputError):
    """Another attempt has taken over the run of this one, which must not write to it any more."""


class _Change(Record):
    epoch: int


class _RunRecord(Record):
    identity: Identity
    attempts: list[_Attempt]
    changes: list[_Change] = Field([])


class _Start(Record):
    epoch: int
    epochs: int
    step: int
    steps: int
    ended: bool


class _Restart(Record):
    cause: str
    workers: int
    start: _Start | None = None


class _Attempt(Record):
    start: _Start | None = None
    damaged_checkpoints: dict[str, str] = Field({})
    restarts: list[_Restart] = Field([])
    outcome: str | None = None


class _Summary(Record):
    run: str
    method: str
    mask: str
    best_epoch: int | None
    epochs: int
    end: str | None
    best_is_last: bool
    evaluations_since_best: int
    best_checkpoint: str | None = Field(pattern=f"^{_CHECKPOINT}$")
    valid: dict[str, float]
    test: dict[str, float] = Field({})


class _Seconds(Record):
    train: float
    evaluate: float
    checkpoint: float


class _Epoch(Record):
    epoch: int
    loss: dict[str, float]
    valid: dict[str, float] = Field({})
    seconds: _Seconds
    replayed: int
    rows_per_second: float


class _Progress(Record):
    epoch: int
    epochs: int
    step: int
    steps: int
    replayed: int
    rows_per_second: float
    loss: dict[str, float]


class RunFolder(AttemptFolder):
    """The folder of one run."""

    what, record_file, record_shape, config_file = "run", "run.json", _RunRecord, "config.yaml"
    files = (
        "run.json", "config.yaml", "metrics.jsonl", "progress.json", "summary.json",
        *(f"evaluation/{split}{rest}" for split in ("valid", "test")
          for rest in (".json", "-users.parquet", "-examples.json")),
    )  # fmt: skip
    folders = ("checkpoints", "evaluation", "tensorboard")

    def __init__(self, folder: Folder):
        super().__init__(folder)
        self.checkpoints = folder.folder("checkpoints")
        self._progress_file: int | None = None
        self._progress_time = 0.0

    @classmethod
    def existing(cls, path: str) -> tuple[RunFolder, RunConfig]:
        """Open the run at `path`; return its folder and its config.

        Raises:
            InputError: there is no run at `path`, or its config is damaged.
            StorageError: it cannot be read.
        """
        run = cls(open_folder(path))
        try:
            text = run.folder.read_bytes("config.yaml")
        except FileNotFoundError:
            raise InputError(
                f"run '{path}' has no config.yaml; give the folder <run.storage>/<run.name> of a training run."
            ) from None
        run.check_kinds()
        place = f"'{run.folder.folder('config.yaml')}'"
        try:
            return run, decode(RunConfig, read_yaml(text, "it"))
        except InputError as error:
            raise InputError(
                f"{place} cannot be used ({str(error).rstrip('.')}); run 'distrec train' with the run's config again, "
                "which writes it anew."
            ) from None

    def open_attempt(self, config: RunConfig, manifest_hash: str) -> dict[str, Any]:
        """Record a new attempt and return the contents of `run.json`.

        Damaged files that training writes anew are removed, and named.

        Raises:
            InputError: the folder holds a run with another identity, a damaged record, or a file in the place of a
                folder; or the storage cannot be written.
        """
        identity = config.identity(manifest_hash)
        changes = [change.model_dump() for change in config.changes]
        with writing_to(config.run.storage):
            self.check_kinds()
            record, trained = self._opened(), self.trained()
            if record is None and trained:
                raise InputError(
                    f"'{self.folder}' holds checkpoints but no run.json, so it is not known what they are of; restore "
                    "the file, use another 'run.name', or delete the folder."
                )
            if record is None:
                record = {"identity": identity, "attempts": []}
            else:
                self._check_identity(record["identity"], identity, config)
                self._check_changes(record.get("changes", []), changes)
            self._remove_damaged()
            if not trained and (epochs := len(self.read_metrics())):
                raise InputError(
                    f"run '{self.folder}' has trained {epochs} epochs but its checkpoints are gone; restore them, use "
                    "another 'run.name', or delete the folder to train from the beginning."
                )
            record["changes"] = changes
            for attempt in record["attempts"]:
                attempt.setdefault("outcome", _KILLED)  # whoever notices first says how an attempt ended
            self.folder.remove(STOP_REQUEST)
            self._write_attempt(
                config,
                record,
                workers=config.train.workers,
                threads=config.train.threads,
                zero_stage=config.dense.zero_stage,
                epochs=config.train.epochs,
                config_sha256=digest(config.model_dump()),
            )
        return record

    def _check_identity(self, old: dict[str, Any], new: dict[str, Any], config: RunConfig) -> None:
        difference = first_difference(old, new)
        if difference is None:
            return
        key, before, value = difference
        remedy = f"use another 'run.name', restore the value, or delete '{self.folder}'."
        if key == "data":
            raise InputError(
                f"run '{self.folder}' was trained on another dataset than '{config.data}' (manifest hash "
                f"{str(before)[:12]}, now {str(value)[:12]}; a new feature set of 'distrec encode' also changes it); "
                f"{remedy}"
            )
        if key in ("evaluate.mask", "evaluate.ks"):  # a run's values all follow one rule
            remedy = f"rank a finished run by another rule with 'distrec evaluate --{key.partition('.')[2]}', {remedy}"
        raise InputError(f"run '{self.folder}' exists with {key} = {before!r}, now {value!r}; {remedy}")

    def _check_changes(self, old: list[dict[str, Any]], new: list[dict[str, Any]]) -> None:
        trained = self.trained()
        before, now = ([change for change in changes if change["epoch"] < trained] for changes in (old, new))
        if before != now:
            raise InputError(
                f"run '{self.folder}' has trained {trained} epochs with changes = {before!r}, now {now!r}; restore "
                f"them (later ones may be set), use another 'run.name', or delete '{self.folder}'."
            )

    def trained(self) -> int:
        """Number of epochs that the checkpoints cover, including one that is only partly trained."""
        places = [checkpoint_place(name) for name in self.checkpoints.names() if is_checkpoint(name)]
        return max((epoch + (step > 0) for epoch, step in places), default=0)

    def _remove_damaged(self) -> None:
        """Remove damaged files that training writes anew, and say so."""
        readers = {
            "metrics.jsonl": (_epochs, "it is written anew from the newest checkpoint"),
            "progress.json": (lambda data: checked(data, _Progress), "steps that are trained again are not counted"),
            "summary.json": (lambda data: checked(data, _Summary), "it is written anew at the end"),
        }
        for name, (read, what) in readers.items():
            if self.folder.exists(name):
                try:
                    read(self.folder.read_bytes(name))
                except ValueError as error:
                    print(f"'{self.folder.folder(name)}' was damaged ({error}): {what}", flush=True)
                    self.folder.remove(name)

    def taken_over(self, attempt: int) -> bool:
        """Whether another attempt was made after number `attempt`; no if the record cannot be read now."""
        try:
            return self.attempts() > attempt
        except InputError:
            return False

    def summary(self) -> dict[str, Any]:
        """The contents of `summary.json`.

        Raises:
            InputError: there is none, or it is damaged.
        """
        if not self.folder.exists("summary.json"):
            raise InputError(
                f"run '{self.folder}' has no summary.json, so its training has not finished; run 'distrec train' on it."
            )
        remedy = "run 'distrec train' with the run's config again, which writes it anew"
        summary: dict[str, Any] = read_record(self.folder, _Summary, "summary.json", remedy=remedy)
        return summary

    def request_stop(self, reason: str = "stop") -> None:
        """Ask the run's workers to save a checkpoint and end."""
        self.folder.write_bytes(reason.encode(), STOP_REQUEST)

    def requested(self) -> str:
        """Why the workers were asked to end; empty if they were not, or it cannot be read."""
        try:
            return self.folder.read_bytes(STOP_REQUEST).decode(errors="replace")
        except (OSError, InputError):
            return ""

    def clear_request(self) -> None:
        """Take back what `request_stop` asked for, before other workers start."""
        self.folder.remove(STOP_REQUEST)

    def note_start(self, place: dict[str, int], ended: bool) -> None:
        """Record where the workers begin, unless workers that began earlier in this attempt have."""
        attempts = self.record["attempts"]
        group = (attempts[-1].get("restarts") or attempts[-1:])[-1]
        if "start" not in group:
            group["start"] = {**place, "ended": ended}
            self.update_record(attempts=attempts)

    def note_groups(self, seconds: dict[str, float], **restart: Any) -> None:
        """Record how long the last start of workers took, and that workers start again.

        Only while no worker is at work: they write to the record too.

        Args:
            seconds: of each phase of the last start; empty if it was not seen.
            restart: facts about the restart; none if there is none.
        """
        attempts = self.record["attempts"]
        restarts = attempts[-1].get("restarts", [])
        if seconds:
            (restarts or attempts[-1:])[-1]["seconds"] = seconds
        if restart:
            attempts[-1]["restarts"] = [*restarts, {"at": now(), **restart}]
        self.update_record(attempts=attempts)

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write all of `metrics.jsonl` anew, so that it always holds a single trajectory."""
        self.folder.write_bytes("".join(json.dumps(record) + "\n" for record in history).encode(), "metrics.jsonl")

    def read_metrics(self, skip: int = 0) -> list[dict[str, Any]]:
        """The epochs in `metrics.jsonl` after the first `skip`; empty if it does not exist yet or these are damaged."""
        try:
            return _epochs(self.folder.read_bytes("metrics.jsonl"), skip)
        except (OSError, ValueError, InputError):
            return []

    def write_progress(self, progress: dict[str, Any]) -> None:
        """Write `progress.json`: on every call on a local disk, at most every 5 s on an object store."""
        if self.folder.local:
            if self._progress_file is None:
                self._progress_file = os.open(self.folder.at("progress.json"), os.O_CREAT | os.O_WRONLY, 0o644)
            os.pwrite(self._progress_file, json.dumps(progress).ljust(1023).encode() + b"\n", 0)
        elif time.monotonic() - self._progress_time > _REMOTE_SECONDS:
            self._progress_time = time.monotonic()
            self.folder.write_json(progress, "progress.json")

    def read_progress(self) -> dict[str, Any]:
        """The content of `progress.json`; empty if it does not exist, is just being written, or is damaged."""
        try:
            progress: dict[str, Any] = checked(self.folder.read_bytes("progress.json"), _Progress)
        except (OSError, ValueError, InputError):
            return {}
        return progress


def _epochs(data: bytes, skip: int = 0) -> list[dict[str, Any]]:
    """The epochs in the bytes of a `metrics.jsonl` after the first `skip`, whose lines are not looked at.

    Raises:
        ValueError: names the first line that is damaged.
    """
    out = []
    for number, line in enumerate(data.splitlines()[skip:], skip + 1):
        try:
            record = checked(line, _Epoch)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if record["epoch"] != number:
            raise ValueError(f"line {number} is of epoch {record['epoch']}")
        out.append(record)
    return out


def checkpoint_name(epoch: int, step: int) -> str:
    """The name of the checkpoint before `step` of `epoch`, both counted from 0. Names sort in training order."""
    return f"epoch-{epoch:06d}-step-{step:09d}"


def is_checkpoint(name: str) -> bool:
    """Whether `name` is one that `checkpoint_name` gives; anything else in `checkpoints/` is not ours."""
    return re.fullmatch(_CHECKPOINT, name) is not None


def checkpoint_place(name: str) -> tuple[int, int]:
    """The epoch and step in a checkpoint's name."""
    found = re.fullmatch(_CHECKPOINT, name)
    assert found is not None, name
    return int(found[1]), int(found[2])


def place_in_words(epoch: int, epochs: int, step: int, steps: int) -> str:
    """How far training has come: after `epoch` of `epochs`, and after `step` of the `steps` of the next one."""
    return f"in epoch {epoch + 1} after step {step} of {steps}" if step else f"after epoch {epoch} of {epochs}"
