"""What lies beside a method for its tests, found by the method's name.

`tests/methods/small/<name>.yaml` holds settings for datasets of a few dozen users and items. Its keys:

    settings: {dim: 8, layers: 2}      # any `dropout` may be on: comparisons of numbers of workers switch it off
    variants:                          # optional: other settings that must also train, each merged into `settings`
      no layers: {layers: 0}
    refuses:                           # optional: data of `test_hard_data.py` that it refuses, and part of the message
      all missing: has 0 independent directions
    tolerance:                         # optional: wider bounds of `tests/training/trajectory.py`, with a comment why
      gradients: 1e-2

`settings` must train on datasets of `tests/training/trajectory.py`, one of which has four items. A method whose
defaults do has `settings: {}`. Widths of tables are multiples of 4 if `optimizer.tables: sparse` is possible.

`tests/methods/plain_<name>.py` is optional. It has a class `Plain` like `plain.Plain`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distrec.config.tree import load_file
from distrec.methods.registry import METHODS

FOLDER = Path(__file__).parent / "small"


@dataclass(frozen=True)
class Small:
    """A file in `tests/methods/small`; the module's docstring says what its keys mean."""

    settings: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    refuses: dict[str, str] = field(default_factory=dict)
    tolerance: dict[str, float] = field(default_factory=dict)


def lacking() -> list[str]:
    """The registered methods without a file of small settings."""
    return [name for name in METHODS if not (FOLDER / f"{name}.yaml").is_file()]


def present() -> list[str]:
    """The registered methods that have one."""
    return [name for name in METHODS if name not in lacking()]


@cache
def small(name: str) -> Small:
    """A method's file; empty if there is none, because one test alone asks for it."""
    return Small() if name in lacking() else Small(**load_file(FOLDER / f"{name}.yaml"))


def settings(name: str, variant: str | None = None) -> dict[str, Any]:
    """The section `method` of a run config for small data."""
    found = small(name)
    return {"name": name} | found.settings | (found.variants[variant] if variant else {})


def steady(method: dict[str, Any]) -> dict[str, Any]:
    """The same section without the dropout that depends on the number of workers."""
    kind = METHODS[method["name"]]
    return method | {key: 0 for key in kind.draws_dropout if key in kind.Config.model_fields}


def cases(*names: str) -> dict[str, dict[str, Any]]:
    """The sections `method` of all methods, or of those named, and of their variants, by "<name>, <variant>"."""
    return {
        f"{name}, {variant}" if variant else name: settings(name, variant)
        for name in names or present()
        for variant in (None, *small(name).variants)
    }


def plain(name: str) -> Any:
    """The class `Plain` of a method; None if nobody wrote one."""
    path = f"tests.methods.plain_{name}"
    return import_module(path).Plain if find_spec(path) else None


def orphans() -> Iterator[str]:
    """Files beside the methods that belong to no registered method."""
    for path in [*FOLDER.iterdir(), *FOLDER.parent.glob("plain_*.py")]:
        if path.stem.removeprefix("plain_") not in METHODS:
            yield path.name
