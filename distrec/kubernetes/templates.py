"""YAML files from the templates beside this module. Values are written as YAML by one function, never pasted."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined

from distrec.errors import shown

# Texts that every YAML parser reads as themselves without quotation marks.
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./@+=-]*(?:[ :][A-Za-z0-9_./@+=-]+)*")
_QUANTITY = re.compile(r"[1-9][0-9]*[A-Z]i")
_WORDS = re.compile(r"(y|n|yes|no|on|off|true|false|null)", re.IGNORECASE)


class _Comment(str):
    """A text inside a comment, which is not written as a value."""


def render(template: str, values: dict[str, Any]) -> str:
    """A template with its values. Names that it uses and that have no value are an error.

    Args:
        template: path of the template below the folder of templates.
        values: the values by name: texts, numbers, Booleans, and lists for loops.
    """
    text = _environment().get_template(template).render(values)
    return "".join(f"{line.rstrip()}\n" for line in text.rstrip().splitlines())


def scalar(value: Any) -> str:
    """A text, number or Boolean as YAML that reads back as the same value, in one line."""
    if isinstance(value, _Comment):
        return value
    if not isinstance(value, str):
        return json.dumps(value if isinstance(value, int) else str(value))  # `str` of a name without a value raises
    if (_QUANTITY.fullmatch(value) or _PLAIN.fullmatch(value)) and not _WORDS.fullmatch(value):
        return value
    quoted: str = yaml.safe_dump(value, default_style='"', width=math.inf)
    return quoted.rstrip("\n")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_template),
        finalize=scalar,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # YAML, not HTML; `finalize` writes every value
    )
    environment.filters["comment"] = lambda text: _Comment(shown(text, 1000, quoted=False))
    return environment


def _template(name: str) -> str:
    return files("distrec.kubernetes").joinpath("templates", *name.split("/")).read_text(encoding="utf-8")
