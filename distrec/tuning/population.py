"""Population-based training (Jaderberg et al. 2017) of one method, by pure functions of the trials in the folder.

A population is `budget.min_trials` trials. All members train for `pbt.interval` epochs and pause. Then clones of the
best replace the worst: a clone continues from the checkpoint of its donor, with other values of the parameters that may
change while a run trains. This repeats until the last epoch. Each stretch of epochs is one start of an ordinary
training run, so a cluster of any size works, and a sweep that was killed continues with the same decisions.

Ray Tune's own scheduler for population-based training keeps the population in the driver's memory, and the order of
events decides which trials are compared. Here a population waits for its last member, so the same sweep always has the
same result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from distrec.data import keyed
from distrec.training.attempts import flat
from distrec.tuning.entries import Entry
from distrec.tuning.folder import Stretch, Trial
from distrec.tuning.space import Range, Space, Values
from distrec.tuning.sweep import PbtSection

_FACTORS = (0.8, 1.2)  # a parameter is multiplied by one of these, as in the paper


@dataclass(frozen=True)
class Population:
    """The rules for the populations of one method.

    Args:
        space: the parameters that may change while a run trains, with their candidates.
        shipped: the values of these parameters in the method's run config.
        interval: the number of epochs between two comparisons.
        epochs: the number of epochs of a whole run.
        seed: the seed of the search.
    """

    label: str
    space: Space
    shipped: Values
    interval: int
    epochs: int
    seed: int
    rules: PbtSection

    @classmethod
    def of(cls, entry: Entry, rules: PbtSection, seed: int) -> Population | None:
        """The population of a method; None if its space has no parameter that may change while a run trains."""
        space = entry.changeable
        if not space:
            return None
        config = flat(entry.base.model_dump())
        shipped = {key: config[key] for key in space}
        return cls(entry.label, space, shipped, entry.interval(rules), entry.base.train.epochs, seed, rules)

    def next_pause(self, trial: Trial) -> int | None:
        """The epoch at which a trial that continues now pauses next; None if it trains to its end."""
        pause = trial.paused + self.interval
        return pause if pause < self.epochs else None

    def step(self, members: Sequence[Trial]) -> list[tuple[Trial, Trial]] | Trial | None:
        """What comes next for the trials of one complete population.

        Returns:
            Pairs of a trial to stop and the clone that replaces it, which the caller has to create; or a trial to
            continue; or None while other members still train, and when all have ended.
        """
        living = [trial for trial in members if not trial.ended]
        at = min((trial.paused for trial in living), default=0)
        if at and all(trial.between_stretches and trial.paused == at for trial in living):
            pairs = self._pairs(members, at)
            if pairs:
                return pairs
        ready = [trial for trial in living if trial.between_stretches and trial.paused == at]
        return min(ready, key=lambda trial: trial.number, default=None)

    def _pairs(self, members: Sequence[Trial], at: int) -> list[tuple[Trial, Trial]]:
        made = {trial.number for trial in members if trial.born == at}
        compared = [
            trial
            for trial in members
            if trial.paused == at and trial.born < at and trial.status in ("waiting", "stopped")
        ]
        ranked = sorted(compared, key=lambda trial: (-(-1.0 if trial.last is None else trial.last), trial.number))
        count = min(math.ceil(self.rules.quantile * len(ranked)), len(ranked) // 2)
        return [
            (loser, self._clone(loser, ranked[:count], at))
            for loser in ranked[len(ranked) - count :]
            if loser.number not in made
        ]

    def _clone(self, loser: Trial, best: Sequence[Trial], at: int) -> Trial:
        key = ("clone", self.seed, self.label, loser.number, at)
        donor = best[int(keyed.integers(key, 0, 1, len(best))[0])]
        now = {**self.shipped, **donor.values}
        values = {name: self._explored(name, now[name], (*key, name)) for name in self.space}
        return replace(
            donor,
            id=f"{self.label}-{loser.number:03d}-epoch{at}",
            number=loser.number,
            values={**donor.values, **values},
            past=[*donor.past, Stretch(at, {**donor.values, **{name: now[name] for name in self.space}})],
            parent=donor.id,
            born=at,
            failures=0,
            seconds=0.0,
        )

    def _explored(self, name: str, value: Any, key: tuple[str | int, ...]) -> Any:
        """Another value of a parameter: sometimes a newly drawn one, otherwise a step away from the current one."""
        candidates = self.space[name]
        chance, draw, up = keyed.uniform(key, 0, 3).tolist()
        anew, direction = chance < self.rules.resample or value == 0, int(up < 0.5)  # no factor moves a zero
        if isinstance(candidates, Range):
            return candidates.at(draw) if anew else candidates.nearest(value * _FACTORS[direction], value)
        if anew or value not in candidates:
            return candidates[int(draw * len(candidates))]
        place = candidates.index(value) + (-1, 1)[direction]
        return candidates[min(max(place, 0), len(candidates) - 1)]
