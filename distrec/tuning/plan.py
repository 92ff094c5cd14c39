"""Decides which trial comes next, by pure functions of the trials that exist.

A trial's method is chosen first, then a point in that method's space. Every method first gets `budget.min_trials`
finished trials. Then the better half of the methods, by best validation value, stays and gets as many again, and so on.
Trial 0 of every method is its unchanged run config, so a search never ends with a result below that of the config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from distrec.config.run import RunConfig
from distrec.data import keyed
from distrec.errors import InputError
from distrec.tuning.folder import Trial, in_place
from distrec.tuning.space import Range, Space, Values, grid, random_point, size
from distrec.tuning.sweep import SweepConfig

Next = tuple[Trial, RunConfig] | Literal["later"] | None
"""What to start now; "later" while that depends on running trials; None if there is nothing left to start."""

_RANDOM_FIRST = 4  # random points of a method, from which the Parzen estimators start
_TRIES = 32  # how often the estimators are asked for a new point


@dataclass(frozen=True)
class Plan:
    """The rules of one sweep's search.

    Args:
        spaces: the space of each method, in the order of the sweep config.
    """

    sweep: SweepConfig
    spaces: Mapping[str, Space]

    def next_trial(self, trials: Sequence[Trial]) -> Trial | None:
        """The trial to start now, or None if there is none. With populations, there may be one later."""
        budget = self.sweep.budget.trials
        places = in_place(trials)
        if budget is not None and len(places) >= budget:
            return None
        exhausted: set[str] = set()
        while (label := self._next_method(trials, exhausted)) is not None:
            number = sum(trial.entry == label for trial in places)
            values = self._point(label, number, trials)
            if values is not None:
                resources = self.sweep.resources
                cpus = max(resources.workers, 1) * resources.cpus_per_worker
                return Trial(f"{label}-{number:03d}", label, number, values, cpus, self.sweep.seed)
            exhausted.add(label)
        return None

    def living(self, trials: Sequence[Trial]) -> list[str]:
        """The methods that have not been dropped, in the order of the sweep config."""
        places = in_place(trials)
        ended = {label: sum(trial.entry == label and trial.ended for trial in places) for label in self.spaces}
        best = {
            label: max(
                (t.value for t in trials if t.entry == label and t.finished and t.value is not None), default=-1.0
            )
            for label in self.spaces
        }
        living, quota = list(self.spaces), self.sweep.budget.min_trials
        while len(living) > 1 and all(ended[label] >= min(quota, self.points(label)) for label in living):
            if all(quota >= self.points(label) for label in living):
                break  # no method left can have more trials
            ranked = sorted(living, key=lambda label: -best[label])
            stay = set(ranked[: math.ceil(len(ranked) / 2)])
            living = [label for label in living if label in stay]
            quota += self.sweep.budget.min_trials
        return living

    def points(self, label: str) -> float:
        """How many trials a method can have: its unchanged config and the points of its space."""
        return 1 + (size(self.spaces[label]) if self.spaces[label] else 0)

    def total(self) -> float:
        """The largest number of trials that the search can have; infinite if only `budget.hours` limits it."""
        asked = self.sweep.budget.trials
        return min(math.inf if asked is None else asked, sum(self.points(label) for label in self.spaces))

    def _next_method(self, trials: Sequence[Trial], exhausted: set[str]) -> str | None:
        """The living method with the fewest trials; once all living methods' spaces are exhausted, another method."""
        count = {label: sum(trial.entry == label for trial in in_place(trials)) for label in self.spaces}
        living = self.living(trials)
        for labels in (living, [label for label in self.spaces if label not in living]):
            candidates = [label for label in labels if label not in exhausted]
            if candidates:
                return min(
                    (label for label in candidates if self._open(label, trials)),
                    key=lambda label: count[label],
                    default=None,
                )
        return None

    def _open(self, label: str, trials: Sequence[Trial]) -> bool:
        """Whether a method may have another trial now.

        Its next population starts only when the previous populations of all methods have ended.
        """
        if self.sweep.scheduler != "pbt":
            return True
        mine, size = sum(trial.entry == label for trial in in_place(trials)), self.sweep.budget.min_trials
        return mine % size > 0 or all(trial.ended or trial.number // size >= mine // size for trial in trials)

    def _point(self, label: str, number: int, trials: Sequence[Trial]) -> Values | None:
        """Point `number` of a method; None past the end of its space."""
        space = self.spaces[label]
        if number == 0:
            return {}
        if not space:
            return None
        if self.sweep.searcher == "grid":
            points = grid(space)
            return points[number - 1] if number <= len(points) else None
        if self.sweep.searcher == "random" or number < 1 + _RANDOM_FIRST:
            return random_point(space, (self.sweep.seed, label), number - 1)
        mine = [trial for trial in trials if trial.entry == label and trial.parent is None]
        return tpe_point(space, (self.sweep.seed, label, number), mine)


def tpe_point(space: Space, key: tuple[str | int, ...], trials: Sequence[Trial]) -> Values | None:
    """A point by Optuna's tree-structured Parzen estimator from the trials of one method (Bergstra et al. 2011).

    This is a pure function of the key and the trials: each call builds a new study from all trials, so the search needs
    no state besides the sweep folder. It never returns a point that was tried before; None if the space, which then has
    no ranges, has no other point.

    Raises:
        InputError: Optuna is not installed.
    """
    optuna = require_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spread = {name: _distribution(optuna, candidates) for name, candidates in space.items()}
    tried = [trial.values for trial in trials]
    if len({repr(values) for values in tried if values}) >= size(space):
        return None
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=keyed.number(("tpe", *key)) % 2**32, multivariate=True),
    )
    for trial in trials:
        if trial.finished and set(trial.values) == set(space):
            parameters = {name: _encoded(candidates, trial.values[name]) for name, candidates in space.items()}
            study.add_trial(optuna.trial.create_trial(params=parameters, distributions=spread, value=trial.value))
    for _ in range(_TRIES):
        asked = study.ask(spread).params
        values = {
            name: candidates[asked[name]] if isinstance(candidates, list) else asked[name]
            for name, candidates in space.items()
        }
        if values not in tried:
            return values
    for number in range(int(min(size(space), _TRIES + len(tried)))):
        values = random_point(space, key, number) or {}
        if values not in tried:
            return values
    return None


def require_optuna():  # type: ignore[no-untyped-def]  # an optional package has no types
    """The package Optuna.

    Raises:
        InputError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise InputError(
            "key 'searcher' is 'tpe' but Optuna is not installed; run 'pip install optuna', or use 'searcher: random'."
        ) from None
    return optuna


def _distribution(optuna, candidates):  # type: ignore[no-untyped-def]
    if not isinstance(candidates, Range):
        # Optuna accepts no lists as choices.
        return optuna.distributions.CategoricalDistribution(list(range(len(candidates))))
    if candidates.integer:
        return optuna.distributions.IntDistribution(int(candidates.low), int(candidates.high), log=candidates.log)
    return optuna.distributions.FloatDistribution(candidates.low, candidates.high, log=candidates.log)


def _encoded(candidates, value):  # type: ignore[no-untyped-def]
    return value if isinstance(candidates, Range) else candidates.index(value)
