"""Which trial comes next, with planted results."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from distrec.tuning.folder import Trial, best_trials
from distrec.tuning.plan import Plan
from distrec.tuning.space import Range, Space, grid
from tests.tuning.planted import plan_of, searched

LR = Range(low=1e-4, high=1e-1, log=True)


def counts(trials: list[Trial]) -> Counter[str]:
    return Counter(trial.entry for trial in trials)


@pytest.mark.parametrize("seed", range(20))
def test_no_method_is_dropped_before_its_minimum_and_the_better_half_goes_on(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = [f"m{number}" for number in range(rng.integers(2, 9))]
    least, at_once = int(rng.integers(1, 4)), int(rng.integers(1, 6))
    total = len(labels) * least + int(rng.integers(0, 30))
    worth = dict(zip(labels, rng.permutation(len(labels)) / 10))
    plan = plan_of(
        tmp_path, {label: {"optimizer.lr": LR} for label in labels}, budget={"trials": total, "min_trials": least}
    )
    trials = searched(plan, lambda trial: worth[trial.entry], at_once)
    number = counts(trials)
    assert len(trials) == total
    assert all(number[label] >= least for label in labels)
    order = sorted(labels, key=lambda label: -worth[label])
    assert number[order[0]] >= max(number.values()) - at_once  # ties, and trials that started before the last drop
    if total >= 4 * len(labels) * least + at_once:
        assert plan.living(trials) == order[:1]
        assert number[order[0]] > number[order[-1]]


def test_a_failed_trial_counts_and_a_method_that_only_fails_is_dropped(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path, {"good": {"optimizer.lr": LR}, "bad": {"optimizer.lr": LR}}, budget={"trials": 12, "min_trials": 2}
    )
    trials = searched(plan, lambda trial: None if trial.entry == "bad" else 0.1)
    assert counts(trials) == {"good": 10, "bad": 2}
    assert set(best_trials(trials)) == {"good"}


@pytest.mark.parametrize("searcher", ["random", "grid", "tpe"])
def test_every_point_of_a_space_is_tried_once_and_the_unchanged_config_first(tmp_path: Path, searcher: str) -> None:
    spaces: dict[str, Space] = {"a": {"method.x": [1, 2, 3], "method.y": [[1], [2]]}, "none": {}}
    plan = plan_of(tmp_path, spaces, searcher=searcher, budget={"trials": 100})
    assert plan.total() == 8
    trials = searched(plan, lambda trial: len(repr(trial.values)) / 100, at_once=3)
    assert counts(trials) == {"a": 7, "none": 1}
    assert [trial.values for trial in trials if trial.number == 0] == [{}, {}]
    points = [repr(trial.values) for trial in trials if trial.entry == "a" and trial.number]
    assert sorted(points) == sorted(map(repr, grid(spaces["a"])))


def test_hours_alone_leave_no_total_where_a_space_has_no_end(tmp_path: Path) -> None:
    assert plan_of(tmp_path, {"a": {"optimizer.lr": LR}}, budget={"trials": None, "hours": 1.0}).total() == float("inf")


@pytest.mark.parametrize("seed", range(3))
def test_tpe_finds_more_than_chance_and_depends_on_what_ended_alone(tmp_path: Path, seed: int) -> None:
    space: Space = {"optimizer.lr": LR, "method.kind": ["p", "q", "r"]}

    def value(trial: Trial) -> float:
        lr, kind = trial.values.get("optimizer.lr", 1e-4), trial.values.get("method.kind", "p")
        return 1 - abs(np.log10(lr) + 2) / 3 - (kind != "q") * 0.3

    best = {}
    for searcher in ("tpe", "random"):
        plan = plan_of(tmp_path / searcher, {"m": space}, searcher=searcher, seed=seed, budget={"trials": 30})
        trials = searched(plan, value)
        best[searcher] = np.mean([value(trial) for trial in trials[15:]])
        again = Plan(plan.sweep, plan.spaces).next_trial(trials[:20])
        assert again is not None
        assert again.values == trials[20].values
        assert len({repr(trial.values) for trial in trials}) == 30
    assert best["tpe"] > best["random"] + 0.05


def test_the_winner_is_the_best_on_validation_and_the_earliest_of_equals() -> None:
    def trial(entry: str, number: int, value: float | None, status: str = "done") -> Trial:
        return Trial(f"{entry}-{number:03d}", entry, number, {}, 1, 1, status, value)  # type: ignore[arg-type]

    trials = [
        trial("a", 2, 0.5), trial("a", 1, 0.5), trial("a", 0, 0.4), trial("a", 3, 0.9, "failed"),
        trial("a", 4, 0.8, "running"), trial("b", 0, 0.1), trial("b", 1, 0.3, "stopped"), trial("c", 0, None, "failed"),
    ]  # fmt: skip
    assert best_trials(trials) == {"a": "a-001", "b": "b-001"}
