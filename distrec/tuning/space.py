"""Search spaces: what `configs/<method>/search.yaml` holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distrec.config.tree import load_file
from distrec.errors import InputError

Space = dict[str, list[Any]]
"""Candidate values of dotted run config keys; a grid is all their combinations."""


def load_spaces(path: str | Path) -> dict[str, Space]:
    """The spaces in a file, by name.

    Raises:
        InputError: unreadable, empty, or a key has no list of different values.
    """
    spaces = load_file(path)
    if not spaces:
        raise InputError(f"search file '{path}' holds no space; name one and its keys.")
    for name, space in spaces.items():
        if not isinstance(space, dict) or not space:
            raise InputError(f"search file '{path}': space '{name}' has no keys; give each a list of values.")
        for key, values in space.items():
            if not isinstance(values, list) or not values or any(values.count(value) > 1 for value in values):
                raise InputError(
                    f"search file '{path}': key '{name}: {key}' is {values}; give a list of different values."
                )
    return spaces
