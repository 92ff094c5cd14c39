"""Config files: YAML with dotted overrides, decoded into typed sections whose errors name the key."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from distrec.config.bounds import MOST_DEPTH
from distrec.config.paths import PATH_WIDTH
from distrec.config.text import read_file, read_yaml
from distrec.errors import InputError, shown


class Section(BaseModel):
    """Base of every config section: unknown keys and silent type conversions are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)

_PLAIN = {
    "bool_type": "true or false",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "string_type": "a string",
    "list_type": "a list",
}
_KINDS = {str: "a text", list: "a list", bool: "true or false", int: "a number", float: "a number"}  # what YAML gives
_WIDEST_KEY = 60  # characters of a key in a message; a key may have any length
_WIDEST = 300  # characters of what a validator says; it may list a value of any length


def load_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: the file cannot be read, is not YAML, or is not a mapping.
    """
    where = f"config file {shown(str(path), PATH_WIDTH)}"
    tree = read_yaml(read_file(path, "config file"), where)
    if tree is None:
        raise InputError(f"{where} is empty; see configs/ for examples.")
    if not isinstance(tree, dict):
        kind = _KINDS.get(type(tree), "one value")
        raise InputError(f"{where} holds {kind}, not keys and values; see configs/ for examples.")
    return tree


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `tree` in which each override `dotted.key=value` is set; values are read as YAML.

    Raises:
        InputError: an override has no key or no `=`, its value is not YAML, or its key goes through a plain value.
    """
    for override in overrides:
        where = f"override {shown(override)}"
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise InputError(f"{where} is not of the form key=value, for example train.epochs=10.")
        tree = set_keys(tree, {key: read_yaml(text, where)}, where)
    return tree


def set_keys(tree: dict[str, Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A copy of `tree` in which each dotted key has its value; `where` names the source of the keys in errors.

    Raises:
        InputError: a key goes through a plain value, or has more parts than any key.
    """
    tree = _copy(tree)
    for key, value in values.items():
        *parents, leaf = key.split(".")
        if len(parents) >= MOST_DEPTH:
            raise InputError(f"{where}: the key {shown(key)} has more than {MOST_DEPTH} parts; shorten it.")
        node = tree
        for depth, part in enumerate(parents):
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise InputError(
                    f"{where}: '{'.'.join(parents[: depth + 1])}' is a value, not a section; remove '.{leaf}'."
                )
        node[leaf] = value
    return tree


def decode(section: type[S], tree: Any, where: str = "") -> S:
    """`tree` as a `section`; `where` is the dotted key of `tree`, empty for a whole config.

    Raises:
        InputError: names the first invalid key, its value, and the nearest valid key or the expected type.
    """
    if not isinstance(tree, dict):
        name = f"'{where}'" if where else "a config"
        raise InputError(f"{name} must hold keys and values, not {shown(tree)}.")
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise InputError(_explain(section, error, where)) from None


def _explain(section: type[BaseModel], error: ValidationError, where: str) -> str:
    problem = error.errors()[0]
    path = [str(part) for part in problem["loc"] if part != "[key]"]  # pydantic's mark of an invalid key
    inner = shown(".".join(path), _WIDEST_KEY, quoted=False)
    key = f"'{where}.{inner}'" if where else f"'{inner}'"
    if problem["type"] == "extra_forbidden":
        valid = _valid_keys(section, path[:-1])
        return f"unknown key {key}; {nearest(path[-1], valid)}."
    if problem["type"] == "missing":
        return f"key {key} is missing; add it."
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    message = shown(_PLAIN.get(problem["type"], message), _WIDEST, quoted=False)
    expected = message if problem["type"] == "value_error" else f"must be {message}"
    if problem["type"] == "too_short":
        least = problem["ctx"]["min_length"]
        expected = f"must have at least {least} {'entry' if least == 1 else 'entries'}"
    value = "empty" if problem["input"] is None else shown(problem["input"])
    return f"key {key} is {value} but {expected}."


def nearest(name: str, valid: Sequence[str]) -> str:
    """A phrase that suggests the closest valid name for an invalid `name`."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    listed = ", ".join(sorted(valid))
    return f"did you mean '{close[0]}'? (valid: {listed})" if close else f"valid here: {listed}"


def _valid_keys(section: type[BaseModel], path: Sequence[str]) -> list[str]:
    current: Any = section
    for part in path:
        field = getattr(current, "model_fields", {}).get(part)
        current = section_of(getattr(field, "annotation", None))
    return list(getattr(current, "model_fields", {}))


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field of this type holds, directly or in a list or mapping; None for plain values."""
    options = [annotation, *get_args(annotation)]
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _copy(tree: Any) -> Any:
    return {key: _copy(value) for key, value in tree.items()} if isinstance(tree, dict) else tree
