"""The folder of a run, `<run.storage>/<run.name>/`, and its files (docs/data.md section 5).

* `config.yaml`: the resolved config of the last attempt.
* `run.json`: identity, attempts, plan, versions, degradations.
* `metrics.jsonl`: one object per epoch; steps that a crash undid leave no trace.
* `progress.json`: the current epoch and step.
* `summary.json`: the best epoch, and its metrics.
* `checkpoints/`, `evaluation/`, `tensorboard/`.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from distrec.config.run import RunConfig, digest
from distrec.config.text import read_yaml
from distrec.config.tree import decode
from distrec.data.storage import Folder, open_folder
from distrec.errors import InputError
from distrec.training.attempts import AttemptFolder, first_difference, writing_to

STOP_REQUEST = "stop-request"
_REMOTE_SECONDS = 5.0


class RunFolder(AttemptFolder):
    """The folder of one run."""

    record_file, config_file = "run.json", "config.yaml"

    def __init__(self, folder: Folder):
        super().__init__(folder)
        self.checkpoints = folder.folder("checkpoints")
        self._progress_file: int | None = None
        self._progress_time = 0.0

    @classmethod
    def existing(cls, path: str) -> tuple[RunFolder, RunConfig]:
        """Open the run at `path`; return its folder and its config.

        Raises:
            InputError: there is no run at `path`.
        """
        run = cls(open_folder(path))
        if not run.folder.exists("config.yaml"):
            raise InputError(
                f"run '{path}' has no config.yaml; give the folder <run.storage>/<run.name> of a training run."
            )
        return run, decode(
            RunConfig, read_yaml(run.folder.read_bytes("config.yaml"), f"file '{run.folder.at('config.yaml')}'")
        )

    def open_attempt(self, config: RunConfig, manifest_hash: str) -> dict[str, Any]:
        """Record a new attempt and return the contents of `run.json`.

        Raises:
            InputError: the folder holds a run with another identity, or the storage cannot be written.
        """
        identity = config.identity(manifest_hash)
        changes = [change.model_dump() for change in config.changes]
        with writing_to(config.run.storage):
            record = self._opened()
            if record is None:
                record = {"identity": identity, "attempts": []}
            else:
                self._check_identity(record["identity"], identity, config)
                self._check_changes(record.get("changes", []), changes)
            record["changes"] = changes
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
        places = [checkpoint_place(name) for name in self.checkpoints.names() if name.startswith("epoch-")]
        return max((epoch + (step > 0) for epoch, step in places), default=0)

    def request_stop(self) -> None:
        """Ask the run's workers to save a checkpoint and stop."""
        self.folder.write_bytes(str(os.getpid()).encode(), STOP_REQUEST)

    def note_outcome(self, outcome: dict[str, Any]) -> None:
        """Record in `run.json` how the current attempt ended."""
        attempts = self.record["attempts"]
        attempts[-1].update(outcome)
        self.update_record(attempts=attempts)

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write all of `metrics.jsonl` anew, so that it always holds a single trajectory."""
        self.folder.write_bytes("".join(json.dumps(record) + "\n" for record in history).encode(), "metrics.jsonl")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The epochs in `metrics.jsonl`; empty if the file does not exist yet."""
        try:
            return [json.loads(line) for line in self.folder.read_bytes("metrics.jsonl").splitlines()]
        except (OSError, ValueError):
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
        """The content of `progress.json`; empty if it does not exist or is just being written."""
        try:
            progress = self.folder.read_json("progress.json")
        except (OSError, ValueError):
            return {}
        return progress if isinstance(progress, dict) else {}


def checkpoint_name(epoch: int, step: int) -> str:
    """The name of the checkpoint before `step` of `epoch`, both counted from 0. Names sort in training order."""
    return f"epoch-{epoch:06d}-step-{step:09d}"


def checkpoint_place(name: str) -> tuple[int, int]:
    """The epoch and step in a checkpoint's name."""
    _, epoch, _, step = name.split("-")
    return int(epoch), int(step)
