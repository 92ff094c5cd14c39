"""Search spaces, as `configs/<method>/search.yaml` holds them, and the points in them.

A space maps dotted run config keys to their candidates: a list of values, or a range `{low, high}`. A range has
`log: true` if the order of magnitude matters, and `integer: true` if it holds only whole numbers. A point of a space
depends only on (seed, entry, number), so the same sweep draws the same points whatever ran before.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from distrec.config.bounds import MOST_CANDIDATES, MOST_TRIALS
from distrec.config.tree import Section, decode, load_file
from distrec.data import keyed
from distrec.errors import InputError, shown

Values = dict[str, Any]
"""A point of a space: the values of dotted run config keys."""

_FIXED = ("data", "run", "tracking", "evaluate", "train.seed", "train.workers", "train.metric", "method.name")


class Range(Section):
    """All numbers from `low` to `high`."""

    low: float = Field(description="smallest value")
    high: float = Field(description="largest value")
    log: bool = Field(False, description="draw values evenly on a logarithmic scale")
    integer: bool = Field(False, description="draw whole numbers only")

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, tree: Any) -> Any:
        ends = {name: float(tree[name]) for name in ("low", "high") if type(tree.get(name)) is int}  # not a Boolean
        return {**tree, **ends}

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low >= self.high:
            raise ValueError("must have 'low' below 'high'")
        if self.log and self.low <= 0:
            raise ValueError("must have 'low' above 0 with 'log: true'")
        if math.isinf(self.high - self.low) or (self.log and math.isinf(self.high / self.low)):
            raise ValueError("must have ends that are closer together")
        if self.integer and (self.low % 1 or self.high % 1):
            raise ValueError("must have whole numbers as 'low' and 'high' with 'integer: true'")
        return self

    def at(self, fraction: float) -> float | int:
        """The value at `fraction` in [0, 1) of the range, measured on its own (linear or logarithmic) scale."""
        if self.integer:
            count = int(self.high - self.low) + 1
            if not self.log:
                return int(self.low) + min(int(fraction * count), count - 1)
            value = math.exp(math.log(self.low) + fraction * math.log((self.high + 1) / self.low))
            return int(min(value, self.high))
        if self.log:
            return float(f"{math.exp(math.log(self.low) + fraction * math.log(self.high / self.low)):.6g}")
        return float(f"{self.low + fraction * (self.high - self.low):.6g}")

    def nearest(self, wanted: float, current: float) -> float | int:
        """The value of the range that is nearest to `wanted`.

        In a range of whole numbers it also differs from `current`, unless that is at the end of the range.
        """
        if not self.integer:
            return min(max(float(f"{wanted:.6g}"), self.low), self.high)
        step = 1 if wanted > current else -1
        whole = round(wanted) if round(wanted) != current else int(current) + step
        return int(min(max(whole, self.low), self.high))


Candidates = list[Any] | Range
Space = dict[str, Candidates]


def load_spaces(path: str | Path) -> dict[str, Space]:
    """The spaces in a file, by name.

    Raises:
        InputError: the file is unreadable or empty, or a key has neither a list of different values nor a range.
    """
    spaces = load_file(path)
    if not spaces:
        raise InputError(f"search file '{path}' holds no space; add a named space with keys.")
    return {name: parse_space(space, f"search file '{path}': space '{name}'") for name, space in spaces.items()}


def parse_space(tree: Any, where: str) -> Space:
    """A space from its YAML form; `where` names it in errors.

    Raises:
        InputError: the space is empty, has a key that the sweep itself sets, or has candidates that are neither a list
            of different values nor a range.
    """
    if not isinstance(tree, dict) or not tree:
        raise InputError(f"{where} has no keys; give each key a list of values or a range.")
    space: Space = {}
    for key, candidates in tree.items():
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in _FIXED):
            raise InputError(
                f"{where}: key '{key}' is not searched, because a sweep sets it for all its trials; remove it."
            )
        if isinstance(candidates, dict):
            try:
                space[key] = decode(Range, candidates, key)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
        elif isinstance(candidates, list) and len(candidates) > MOST_CANDIDATES:
            raise InputError(
                f"{where}: key {shown(key)} lists {len(candidates):,} values; list at most {MOST_CANDIDATES:,}, or "
                "give a range {low, high}."
            )
        elif (
            isinstance(candidates, list) and candidates and not any(candidates.count(value) > 1 for value in candidates)
        ):
            space[key] = candidates
        else:
            raise InputError(
                f"{where}: key {shown(key)} is {shown(candidates)}; give a list of different values, or a range "
                "{low, high}."
            )
    return space


def grid(space: Space) -> list[Values]:
    """All combinations of the candidates; the last key varies fastest. A space without keys has one, the empty point.

    Raises:
        InputError: a key has a range, which has no grid, or there are too many points to list.
    """
    for key, candidates in space.items():
        if isinstance(candidates, Range):
            raise InputError(f"key '{key}' has a range, which has no grid; list its values, or use another 'searcher'.")
    if size(space) > MOST_TRIALS:
        raise InputError(
            f"the space has {size(space):.3g} points, and a grid has at most {MOST_TRIALS:,}; list fewer values, or "
            "use another 'searcher'."
        )
    return [dict(zip(space, point)) for point in itertools.product(*space.values())]


def size(space: Space) -> float:
    """The number of different points in the space; infinite if it has a range."""
    return math.prod(math.inf if isinstance(candidates, Range) else len(candidates) for candidates in space.values())


def random_point(space: Space, key: tuple[str | int, ...], number: int) -> Values | None:
    """Point `number` (from 0) of the random sequence that `key` determines.

    Without a range, the sequence is the grid in random order, so no point occurs twice; past its end the result is
    None.
    """
    if size(space) < 1 << 20:
        points = int(size(space))
        if number >= points:
            return None
        return _nth(space, int(keyed.permutation(("space", *key), points)[number]))
    out: Values = {}
    for name, candidates in space.items():
        fraction = float(keyed.uniform(("space", *key, name), number, 1)[0])
        out[name] = (
            candidates.at(fraction) if isinstance(candidates, Range) else candidates[int(fraction * len(candidates))]
        )
    return out


def _nth(space: Space, index: int) -> Values:
    """Point `index` of the grid, computed without listing the grid."""
    out: Values = {}
    for name, candidates in reversed(space.items()):
        assert isinstance(candidates, list)
        index, place = divmod(index, len(candidates))
        out[name] = candidates[place]
    return {name: out[name] for name in space}
