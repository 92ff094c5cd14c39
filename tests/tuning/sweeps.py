"""The sweep that several tests run, and functions that read a sweep's results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.training import small

METHODS: dict[str, dict[str, Any]] = {
    "lightgcn": {"space": {"method.layers": [1, 2, 3]}, "train": {"global_batch": 8, "epochs": 8}},
    "bprmf": {
        "space": {"method.reg": {"low": 1e-5, "high": 1e-2, "log": True}},
        "train": {"global_batch": 8, "epochs": 8},
    },
}
SECTIONS: dict[str, Any] = {"budget": {"trials": 5, "min_trials": 2}, "resources": {"cpus_per_worker": 1}}


def trials(sweep: Path, phase: str = "trials") -> dict[str, dict[str, Any]]:
    """The records of a phase's trials by id."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted((sweep / phase).glob("*/trial.json"))}


def results(sweep: Path) -> dict[str, Any]:
    """The losses and metrics of every trial and of every winner's seed, without durations."""
    found = {}
    for phase in ("trials", "final"):
        for name in trials(sweep, phase):
            run = sweep / phase / name
            epochs = [(record["epoch"], record["loss"], record.get("valid")) for record in small.metrics(run)]
            summary = small.read(run, "summary.json")
            found[f"{phase}/{name}"] = (epochs, summary["valid"], summary.get("test"))
    return found


def attempts(run: Path) -> int:
    return len(small.read(run, "run.json")["attempts"])
