"""Population-based training: which trials are replaced with planted results, whatever the order of events."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distrec.data import keyed
from distrec.errors import InputError
from distrec.tuning.entries import resolve_entries
from distrec.tuning.folder import SweepFolder, Trial
from distrec.tuning.space import Range
from distrec.tuning.sweep import load_sweep
from distrec.tuning.tune import Search
from tests.training import small
from tests.tuning.planted import write_sweep

LR = {"low": 1e-4, "high": 1e-1, "log": True}
METHODS: dict[str, dict[str, Any]] = {
    "lightgcn": {"space": {"optimizer.lr": LR, "method.layers": [1, 2, 3]}, "train": {"epochs": 14}},
    "bprmf": {
        "space": {"method.reg": {"low": 1e-5, "high": 1e-1, "log": True}},
        "train": {"epochs": 11, "eval_every": 2},
    },
    "popularity": {},
    "stair": {"space": {"method.gamma": [0.1, 0.2, 0.3]}, "train": {"epochs": 14}},
}


def search_of(path: Path, data: str, methods: Sequence[str] = tuple(METHODS), **sections: Any) -> Search:
    """The search in `path` as a newly started process sees it."""
    settings: dict[str, Any] = {"budget": {"trials": 30, "min_trials": 4}, "scheduler": "pbt", "pbt": {"interval": 3}}
    sweep = load_sweep(write_sweep(path, data, {label: METHODS[label] for label in methods}, **(settings | sections)))
    entries, folder = resolve_entries(sweep), SweepFolder.of(sweep)
    new = folder.open_attempt(sweep, entries, "hash")
    return Search(sweep, entries, folder, 1, new)


def value(trial: Trial, epochs: int) -> float:
    """The value of a trial after some epochs: random, but fixed for the trial."""
    return float(keyed.uniform(("worth", trial.id, epochs), 0, 1)[0])


class Killed(Exception):
    """Stands for a SIGKILL."""


def searched(path: Path, data: str, at_once: int, killed: random.Random | None = None, **sections: Any) -> list[Trial]:
    """Run a search without training and return the trials in its folder; `killed` kills it at random moments."""
    search = search_of(path, data, **sections)
    running: list[tuple[Trial, int]] = []

    def following() -> Any:
        """What comes next; sometimes killed before one of the writes."""
        write = SweepFolder.write_trial

        def deadly(*arguments: Any) -> None:
            if killed is not None and killed.random() < 0.3:
                raise Killed
            write(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SweepFolder, "write_trial", deadly)
            return search._next()

    while True:
        try:
            if killed is not None and killed.random() < 0.2:
                raise Killed
            found = following() if len(running) < at_once else "later"
        except Killed:  # the results of the running trials are lost
            search, running = search_of(path, data, **sections), []
            continue
        if isinstance(found, tuple):
            trial, config = found
            trial.status = "running"
            search.folder.write_trial("trials", trial)
            running.append((trial, config.train.epochs))
            continue
        if not running:
            assert found is None
            return search.folder.trials("trials")
        trial, epochs = running.pop(0)
        trial.last = value(trial, epochs)
        trial.value = max(trial.value or 0.0, trial.last)
        write_run(search.folder, trial, epochs)
        trial.finish(epochs)
        search.folder.write_trial("trials", trial)


def write_run(folder: SweepFolder, trial: Trial, epochs: int) -> None:
    """Write the files of the trial's training that a search reads."""
    run = folder.run("trials", trial)
    history = run.read_metrics()
    history += [small.planted_epoch(epoch) for epoch in range(len(history) + 1, epochs)]
    run.write_metrics([*history, small.planted_epoch(epochs, valid={"recall@20": trial.last})])
    best = {"method": "planted", "best_epoch": None, "best_checkpoint": None}
    run.folder.write_json({**best, "epochs": epochs, "valid": {"recall@20": trial.value}}, "summary.json")


def records(trials: list[Trial]) -> list[dict[str, Any]]:
    return [{key: value for key, value in asdict(trial).items() if key != "seconds"} for trial in trials]


@pytest.mark.parametrize(
    ("seed", "trials", "kills"),  # trials: with complete and with incomplete populations
    [(0, 17, 1), (1, 16, 1), *(pytest.param(*case, marks=pytest.mark.wide) for case in ((2, 30, 3), (3, 23, 3)))],
)
def test_neither_the_order_of_events_nor_a_kill_changes_a_decision(
    tmp_path: Path, data: str, seed: int, trials: int, kills: int
) -> None:
    budget = {"trials": trials, "min_trials": 4}
    want = records(searched(tmp_path / "one", data, 1, seed=seed, budget=budget))
    assert records(searched(tmp_path / "many", data, 5, seed=seed, budget=budget)) == want
    for again in range(kills):
        moments = random.Random(10 * seed + again)
        assert records(searched(tmp_path / f"killed{again}", data, 3, moments, seed=seed, budget=budget)) == want


def test_a_population_trains_as_many_at_once_as_there_is_room_for(tmp_path: Path, data: str) -> None:
    search = search_of(tmp_path, data, budget={"trials": 18, "min_trials": 6}, methods=["lightgcn"])
    for stretch in range(3):
        started = []
        for _ in range(6):
            found = search._next()
            assert isinstance(found, tuple)
            trial, config = found
            assert config.train.epochs == 3 * (stretch + 1)
            trial.status = "running"
            started.append(trial)
        assert search._next() == "later"
        for trial in started:
            trial.last = trial.value = value(trial, stretch)
            trial.finish(3 * (stretch + 1))
            search.folder.write_trial("trials", trial)


@pytest.mark.parametrize("seed", range(4))
def test_clones_of_the_best_replace_the_worst(tmp_path: Path, data: str, seed: int) -> None:
    quantile = (0.25, 0.5)[seed % 2]
    trials = searched(tmp_path, data, 2, seed=seed, pbt={"interval": 3, "quantile": quantile})
    by_id = {trial.id: trial for trial in trials}
    clones = [trial for trial in trials if trial.parent]
    assert {trial.entry for trial in clones} == {"lightgcn", "bprmf"}
    assert {trial.born for trial in clones if trial.entry == "lightgcn"} == {3, 6, 9, 12}
    assert {trial.born for trial in clones if trial.entry == "bprmf"} == {4, 8}  # whole evaluations
    space = {"lightgcn": ("optimizer.lr", Range(**LR)), "bprmf": ("method.reg", Range(low=1e-5, high=1e-1, log=True))}
    for clone in clones:
        group = [t for t in trials if t.entry == clone.entry and t.number // 4 == clone.number // 4]
        assert clone.parent is not None
        donor = by_id[clone.parent]
        (loser,) = [t for t in group if t.number == clone.number and t.status == "stopped" and t.paused == clone.born]
        assert donor in group
        compared = [t for t in group if t.born < clone.born and (t.paused >= clone.born or t.status == "done")]
        assert len(compared) == 4
        ranked = sorted((value(t, clone.born) for t in compared), reverse=True)
        count = int(4 * quantile)
        assert value(donor, clone.born) in ranked[:count]
        assert value(loser, clone.born) in ranked[-count:]
        key, candidates = space[clone.entry]
        before = clone.past[-1]
        assert before.until == clone.born
        assert candidates.low <= clone.values[key] <= candidates.high
        assert {name: x for name, x in clone.values.items() if name != key} == {
            name: x for name, x in donor.values.items() if name != key
        }
    moved = [clone.values[k] / clone.past[-1].values[k] for clone in clones for k in [space[clone.entry][0]]]
    assert sum(np.isclose(ratio, (0.8, 1.2), rtol=1e-4).any() for ratio in moved) >= len(moved) // 3
    places = {(trial.entry, trial.number) for trial in trials}
    assert len(places) == 30
    assert all(trial.status in ("done", "stopped") for trial in trials)
    assert sum(trial.status == "done" for trial in trials) == 30


def test_the_better_half_of_the_methods_gets_another_population(tmp_path: Path, data: str) -> None:
    trials = searched(tmp_path, data, 3, budget={"trials": 4 + 4 + 1 + 4 + 8, "min_trials": 4})
    later = {trial.entry for trial in trials if trial.number >= 4}
    best = {label: max(t.value or 0 for t in trials if t.entry == label and t.number < 4) for label in METHODS}
    assert later == set(sorted(best, key=lambda label: -best[label])[:2])
    assert "popularity" not in later  # its space has no more points


def test_the_config_of_a_clone_holds_its_earlier_settings(tmp_path: Path, data: str) -> None:
    trials = searched(tmp_path, data, 2)
    search = search_of(tmp_path, data)
    deep = max((trial for trial in trials if trial.entry == "lightgcn"), key=lambda trial: len(trial.past))
    assert len(deep.past) >= 2
    config = search._config("trials", deep)
    rates = [stretch.values["optimizer.lr"] for stretch in deep.past] + [deep.values["optimizer.lr"]]
    assert config.optimizer.lr == rates[0]
    changes = {change.epoch: change.values for change in config.changes}
    for stretch, before, now in zip(deep.past, rates, rates[1:], strict=False):
        assert changes.get(stretch.until, {"optimizer.lr": before}) == {"optimizer.lr": now}


@pytest.mark.parametrize(
    ("sections", "methods", "message"),
    [
        ({"budget": {"trials": 30, "min_trials": 1}}, METHODS, "'budget.min_trials' is 1 but 'scheduler: pbt'"),
        ({}, {"popularity": {}, "stair": METHODS["stair"]}, "no method's space has a parameter that may change"),
        ({"pbt": {"interval": 14}}, {"lightgcn": METHODS["lightgcn"]}, "'pbt.interval' is 14"),
        ({"pbt": {"interval": 9}}, {"lightgcn": {**METHODS["lightgcn"], "overrides": {"train.eval_every": 8}}},
         r"is 9 \(16 epochs when rounded up to whole evaluations\), but"),
        ({}, {"lightgcn": {**METHODS["lightgcn"],
                           "overrides": {"changes": [{"epoch": 1, "values": {"method.reg": 1.0}}]}}},
         "key 'changes' is set"),
        ({}, {"lightgcn": {"space": {"optimizer.lr": LR, "train.epochs": [9, 12]}}}, "searches 'train.epochs'"),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, data: str, sections: dict[str, Any], methods: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"budget": {"trials": 30, "min_trials": 4}, "scheduler": "pbt"}
    with pytest.raises(InputError, match=message):
        resolve_entries(load_sweep(write_sweep(tmp_path, data, methods, **(settings | sections))))
