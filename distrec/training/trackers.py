"""Experiment trackers, each through its own library: TensorBoard, MLflow if configured, Prometheus on a Ray cluster.

They are beside the run: what goes wrong in one never ends it. A full disk or a server that does not answer is a warning
in `run.json`, and the tracker is off from then on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from distrec.config.run import RunConfig
from distrec.errors import InputError, shown
from distrec.training.prometheus import Prometheus, connected
from distrec.training.run_folder import RunFolder


class Trackers:
    """Gives the numbers of each epoch to the configured trackers, and those of steps to Prometheus.

    Does nothing unless `enabled` (on rank 0).
    """

    def __init__(self, run: RunFolder, config: RunConfig, enabled: bool):
        self._run = run
        self._on: dict[str, _Board | _MLflow | Prometheus] = {}
        if enabled and config.tracking.tensorboard:
            with self._harmless("TensorBoard"):
                self._on["TensorBoard"] = _Board(str(run.folder.folder("tensorboard")))
        if enabled and config.tracking.mlflow:
            with self._harmless("MLflow"):
                self._on["MLflow"] = _MLflow(config)
        if enabled and connected():
            with self._harmless("Prometheus"):
                self._on["Prometheus"] = Prometheus(config)

    def step(self, progress: dict[str, Any]) -> None:
        """Show a step, given as the content of `progress.json`."""
        prometheus = self._on.get("Prometheus")
        if isinstance(prometheus, Prometheus):
            with self._harmless("Prometheus"):
                prometheus.step(progress)

    def epoch(self, record: dict[str, Any]) -> None:
        """Write one epoch's record."""
        for name, tracker in [*self._on.items()]:
            with self._harmless(name):
                tracker.epoch(record)

    def close(self, summary: dict[str, Any] | None = None) -> None:
        """Write the summary, if the run has finished, and close the trackers."""
        for name, tracker in [*self._on.items()]:
            with self._harmless(name):
                tracker.close(summary)

    @contextmanager
    def _harmless(self, name: str) -> Iterator[None]:
        """A context that uses a tracker. Any error in it turns the tracker off, with a warning in `run.json`."""
        try:
            yield
        except Exception as error:  # each library, and each of its stores, has its own
            self._on.pop(name, None)
            text = re.sub("//[^/@ ]*@", "//", str(error))  # a URI may hold a password
            reason = shown(text or type(error).__name__, 200, quoted=False)
            warning = f"{name} is off for the rest of this attempt ({reason}); training goes on without it"
            with suppress(OSError, InputError):  # the disk may be full for the record, too
                before = self._run.record.get("warnings", [])
                if warning not in before:
                    self._run.update_record(warnings=[*before, warning])


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of an epoch's record, by the names that TensorBoard and MLflow show."""
    numbers = {f"loss/{name}": value for name, value in record["loss"].items()}
    numbers |= {f"valid/{name}": value for name, value in record.get("valid", {}).items()}
    numbers |= {f"seconds/{name}": value for name, value in record["seconds"].items()}
    return numbers | {"rows_per_second": record["rows_per_second"]}


class _Board:
    def __init__(self, folder: str):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder)

    def epoch(self, record: dict[str, Any]) -> None:
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record["epoch"])

    def close(self, summary: dict[str, Any] | None) -> None:
        self._writer.close()


class _MLflow:
    """One MLflow run. It is named in each call: epochs are written by another thread, which has no current run."""

    def __init__(self, config: RunConfig):
        import mlflow

        mlflow.set_tracking_uri(config.tracking.mlflow)
        mlflow.set_experiment("distrec")
        self._run = mlflow.start_run(run_name=config.run.name).info.run_id
        mlflow.log_params({f"method.{key}": value for key, value in config.method.items()})
        self._mlflow = mlflow

    def epoch(self, record: dict[str, Any]) -> None:
        self._log(_numbers(record), step=record["epoch"])

    def close(self, summary: dict[str, Any] | None) -> None:
        self._log({f"test/{name}": value for name, value in (summary or {}).get("test", {}).items()})
        self._mlflow.end_run()

    def _log(self, numbers: dict[str, float], **step: int) -> None:
        plain = {name.replace("@", "_at_"): value for name, value in numbers.items()}  # MLflow refuses '@'
        self._mlflow.log_metrics(plain, run_id=self._run, **step)
