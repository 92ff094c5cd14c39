"""Experiment trackers: TensorBoard and, if configured, MLflow, each through its own library."""

from __future__ import annotations

from typing import Any

from distrec.config.run import RunConfig
from distrec.training.run_folder import RunFolder


class Trackers:
    """Writes the numbers of each epoch to the configured trackers; does nothing unless `enabled` (on rank 0)."""

    def __init__(self, run: RunFolder, config: RunConfig, enabled: bool):
        self._board: Any = None
        self._mlflow: Any = None
        if enabled and config.tracking.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run.folder.folder("tensorboard")))
        if enabled and config.tracking.mlflow:
            import mlflow

            mlflow.set_tracking_uri(config.tracking.mlflow)
            mlflow.set_experiment("distrec")
            mlflow.start_run(run_name=config.run.name)
            mlflow.log_params({f"method.{key}": value for key, value in config.method.items()})
            self._mlflow = mlflow

    def epoch(self, record: dict[str, Any]) -> None:
        """Write one epoch's record."""
        numbers = {f"loss/{name}": value for name, value in record["loss"].items()}
        numbers |= {f"valid/{name}": value for name, value in record.get("valid", {}).items()}
        numbers |= {f"seconds/{name}": value for name, value in record["seconds"].items()}
        numbers["rows_per_second"] = record["rows_per_second"]
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, record["epoch"])
        if self._mlflow is not None:
            self._mlflow.log_metrics({_plain(name): value for name, value in numbers.items()}, step=record["epoch"])

    def close(self, summary: dict[str, Any] | None = None) -> None:
        """Write the summary, if the run has finished, and close the trackers."""
        if self._board is not None:
            self._board.close()
        if self._mlflow is not None:
            self._mlflow.log_metrics(
                {_plain(f"test/{name}"): value for name, value in (summary or {}).get("test", {}).items()}
            )
            self._mlflow.end_run()


def _plain(name: str) -> str:
    return name.replace("@", "_at_")  # MLflow refuses '@'
