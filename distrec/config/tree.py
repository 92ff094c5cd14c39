"""Config files: YAML with dotted overrides, decoded into typed sections whose errors name the key."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from distrec.errors import InputError


class Section(BaseModel):
    """Base of every config section: unknown keys and silent type conversions are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-3` is a number (YAML 1.1 reads a string, as it has no dot) and a repeated key an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"key '{key_node.value}' appears twice (line {line})")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every string that `_Loader` would read as something else, and writes repeated values out."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
    r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse_scalar(text: str, where: str) -> Any:
    """The YAML value of `text`, as a config file would read it."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{where}: '{text}' is not a YAML value ({_first_line(error)}); quote it.") from None


def yaml_lines(key: str, value: Any, width: int) -> list[str]:
    """Lines of YAML that `load_file` reads back as `key: value`; inner lists and mappings take one line if they fit."""
    for flow in (None, False) if isinstance(value, (dict, list)) else (False,):
        text = yaml.dump({key: value}, Dumper=_Dumper, default_flow_style=flow, sort_keys=False, width=math.inf)
        lines: list[str] = text.splitlines()
        if all(len(line) <= width for line in lines):
            break
    return lines


def load_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"config file '{path}' cannot be read ({error.strerror}); give the path of a YAML file."
        ) from None
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InputError(f"config file '{path}' is not valid YAML: {_first_line(error)}; fix that line.") from None
    if not isinstance(tree, dict):
        raise InputError(
            f"config file '{path}' holds {type(tree).__name__}, not keys and values; see configs/ for examples."
        )
    return tree


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `tree` in which each override `dotted.key=value` is set; values are read as YAML.

    Raises:
        InputError: an override has no key or no `=`, its value is not YAML, or its key goes through a plain value.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise InputError(f"override '{override}' is not of the form key=value, for example train.epochs=10.")
        tree = set_keys(tree, {key: parse_scalar(text, f"override '{override}'")}, f"override '{override}'")
    return tree


def set_keys(tree: dict[str, Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A copy of `tree` in which each dotted key has its value; `where` names the source of the keys in errors.

    Raises:
        InputError: a key goes through a plain value.
    """
    tree = _copy(tree)
    for key, value in values.items():
        *parents, leaf = key.split(".")
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
        raise InputError(f"'{where}' must hold keys and values, not {tree!r}.")
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise InputError(_explain(section, error, where)) from None


def _explain(section: type[BaseModel], error: ValidationError, where: str) -> str:
    problem = error.errors()[0]
    path = [str(part) for part in problem["loc"] if part != "[key]"]  # pydantic's mark of an invalid key
    key = ".".join([where, *path] if where else path)
    if problem["type"] == "extra_forbidden":
        valid = _valid_keys(section, path[:-1])
        return f"unknown key '{key}'; {nearest(path[-1], valid)}."
    if problem["type"] == "missing":
        return f"key '{key}' is missing; add it."
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    expected = message if problem["type"] == "value_error" else f"must be {message}"
    return f"key '{key}' is {problem['input']!r} but {expected}."


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


def _first_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None)
    return f"{problem} (line {mark.line + 1})" if mark and problem else str(error).splitlines()[0]
