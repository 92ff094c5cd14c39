"""Numbers of a run as Prometheus gauges, through Ray's own metrics: each Ray node serves those of its processes.

Ray puts `ray_` before the names. A process that ends takes its gauges with it, within half a minute.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from distrec.config.run import RunConfig

GAUGES: dict[str, tuple[str, str | None]] = {
    "distrec_epoch": ("epoch that is being trained, from 1", None),
    "distrec_epochs": ("largest number of epochs of the run", None),
    "distrec_step": ("steps of this epoch that are done", None),
    "distrec_steps": ("steps of an epoch", None),
    "distrec_loss": ("a term of the loss, in the newest step", "term"),
    "distrec_rows_per_second": ("rows trained per second of this epoch, by all workers together", None),
    "distrec_validation": ("a metric of the validation split, after the last epoch that was ranked", "metric"),
    "distrec_workers": ("workers that trained the last epoch", None),
    "distrec_peak_memory_bytes": ("peak resident memory of the worker that used the most", None),
    "distrec_checkpoint_seconds": ("seconds for which training stopped for the last epoch's checkpoint", None),
    "distrec_restarts": ("how often the workers of the run have started again", None),
}
"""Description, and the label besides `run` and `method`, by name."""

_PAUSE = 1.0  # seconds between two steps whose numbers are set; Ray collects them every few seconds


def connected() -> bool:
    """Whether this process is part of a Ray cluster. It does not import Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


class Prometheus:
    """The gauges of one run in a process that is part of a Ray cluster.

    Args:
        config: the run's config.
    """

    def __init__(self, config: RunConfig):
        from ray.util.metrics import Gauge

        self._tags = {"run": config.run.name, "method": str(config.method["name"])}
        self._gauges = {
            name: Gauge(name, text, tag_keys=(*self._tags, *([label] if label else [])))
            for name, (text, label) in GAUGES.items()
        }
        self._last = float("-inf")

    def step(self, progress: dict[str, Any]) -> None:
        """Show a step, unless the last one shown was a moment ago.

        Args:
            progress: what `progress.json` holds.
        """
        if (now := time.monotonic()) - self._last < _PAUSE:
            return
        self._last = now
        for name in ("epoch", "epochs", "step", "steps", "rows_per_second"):
            self._set(f"distrec_{name}", progress[name])
        for term, value in progress["loss"].items():
            self._set("distrec_loss", value, term)

    def epoch(self, record: dict[str, Any]) -> None:
        """Show a finished epoch.

        Args:
            record: its line of `metrics.jsonl`.
        """
        self._last = float("-inf")  # so that the first step of the next epoch is shown
        for metric, value in record.get("valid", {}).items():
            self._set("distrec_validation", value, metric)
        self._set("distrec_workers", record["workers"])
        self._set("distrec_peak_memory_bytes", record["peak_memory_bytes"])
        self._set("distrec_checkpoint_seconds", record["seconds"]["checkpoint"])

    def restarts(self, number: int) -> None:
        """Show how often workers have started again, in all attempts of the run together."""
        self._set("distrec_restarts", number)

    def close(self, summary: dict[str, Any] | None) -> None:
        """There is nothing to close: the gauges end with the process."""

    def _set(self, name: str, value: float, label: str | None = None) -> None:
        further = GAUGES[name][1]
        self._gauges[name].set(value, {**self._tags, **({further: str(label)} if further else {})})
