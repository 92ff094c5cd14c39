"""Experiment trackers: TensorBoard and, if configured, MLflow, each through its own library.

They are beside the run: what goes wrong in one never ends it. A full disk or a server that does not answer is a warning
in `run.json`, and the tracker is off from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distrec.config.run import RunConfig
from distrec.errors import shown
from distrec.training.run_folder import RunFolder


class Trackers:
    """Writes the numbers of each epoch to the configured trackers; does nothing unless `enabled` (on rank 0)."""

    def __init__(self, run: RunFolder, config: RunConfig, enabled: bool):
        self._run, self._config = run, config
        self._on: dict[str, Any] = {}
        if enabled and config.tracking.tensorboard:
            self._try("TensorBoard", lambda: _Board(str(run.folder.folder("tensorboard"))))
        if enabled and config.tracking.mlflow:
            self._try("MLflow", lambda: _MLflow(config))

    def epoch(self, record: dict[str, Any]) -> None:
        """Write one epoch's record."""
        numbers = {f"loss/{name}": value for name, value in record["loss"].items()}
        numbers |= {f"valid/{name}": value for name, value in record.get("valid", {}).items()}
        numbers |= {f"seconds/{name}": value for name, value in record["seconds"].items()}
        numbers["rows_per_second"] = record["rows_per_second"]
        for name, tracker in [*self._on.items()]:
            self._try(name, lambda tracker=tracker: tracker.epoch(numbers, record["epoch"]))

    def close(self, summary: dict[str, Any] | None = None) -> None:
        """Write the summary, if the run has finished, and close the trackers."""
        test = {f"test/{name}": value for name, value in (summary or {}).get("test", {}).items()}
        for name, tracker in [*self._on.items()]:
            self._try(name, lambda tracker=tracker: tracker.close(test))

    def _try(self, name: str, action: Callable[[], Any]) -> None:
        """Set or keep tracker `name` if `action` succeeds; otherwise turn it off with a warning."""
        try:
            self._on[name] = action() or self._on.get(name)
        except Exception as error:  # anything: each library, and each of its stores, has its own
            self._on.pop(name, None)
            reason = shown(str(error) or type(error).__name__, 200, quoted=False)
            self._run.warn(f"{name} is off for the rest of this attempt ({reason}); training goes on without it.")


class _Board:
    def __init__(self, folder: str):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder)

    def epoch(self, numbers: dict[str, float], epoch: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, epoch)

    def close(self, test: dict[str, float]) -> None:
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

    def epoch(self, numbers: dict[str, float], epoch: int) -> None:
        self._log(numbers, step=epoch)

    def close(self, test: dict[str, float]) -> None:
        self._log(test)
        self._mlflow.end_run()

    def _log(self, numbers: dict[str, float], **step: int) -> None:
        plain = {name.replace("@", "_at_"): value for name, value in numbers.items()}  # MLflow refuses '@'
        self._mlflow.log_metrics(plain, run_id=self._run, **step)
