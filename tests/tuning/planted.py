"""Sweep configs for the small dataset, and searches whose results are planted instead of trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from distrec.tuning.folder import Trial
from distrec.tuning.plan import Plan
from distrec.tuning.space import Space
from distrec.tuning.sweep import SweepConfig, load_sweep
from tests.training import small


def write_sweep(path: Path, data: str, methods: Mapping[str, dict[str, Any]], **sections: Any) -> str:
    """Write a sweep config and its run configs; returns its path.

    `methods` has the section of each entry, without its `config`.
    """
    tree: dict[str, Any] = {
        "run": {"name": "sweep", "storage": str(path)},
        "data": data,
        "methods": {},
        "budget": {"trials": 4},
        "seeds": 1,
        "resources": {"cpus_per_worker": 1},
        "tracking": {"tensorboard": False},
    }
    for label, section in methods.items():
        own = dict(section)
        method, train = own.pop("method", label), own.pop("train", {})
        config = small.write_config(path / label / "run.yaml", data, path, method, train=train)
        tree["methods"][label] = {"config": config, **own}
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    target = path / "sweep.yaml"
    target.write_text(yaml.safe_dump(tree))
    return str(target)


def plan_of(path: Path, spaces: Mapping[str, Space], **sections: Any) -> Plan:
    """The plan of a sweep over `spaces`; its runs are never started."""
    sweep: SweepConfig = load_sweep(
        write_sweep(path, "data", {label: {"method": "bprmf"} for label in spaces}, **sections)
    )
    return Plan(sweep, spaces)


def searched(plan: Plan, value: Callable[[Trial], float | None], at_once: int = 1) -> list[Trial]:
    """The trials of a search in which each trial ends with the value `value(trial)`, or fails if it is None."""
    trials: list[Trial] = []
    running: list[Trial] = []
    while True:
        while len(running) < at_once and (trial := plan.next_trial(trials)) is not None:
            trial.status = "running"
            trials.append(trial)
            running.append(trial)
        if not running:
            return trials
        trial = running.pop(0)
        trial.value = value(trial)
        trial.status = "failed" if trial.value is None else "done"
