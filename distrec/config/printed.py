"""A config as YAML in which every key has its description as a comment, for `--print-config`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any, get_origin

from pydantic import BaseModel

from distrec.config.text import yaml_lines
from distrec.config.tree import Section, section_of

_WIDTH = 120


def commented(section: Section, **parts: type[Section]) -> str:
    """`section` as YAML that reads back as the same values, with the descriptions of its fields as comments.

    A description follows its value on the same line, or precedes it if that line would exceed 120 columns. If a list or
    mapping holds several sections of one kind, only the first one has comments.

    Args:
        section: the config to show.
        parts: the section types of fields that are plain mappings in `section`, such as `method` of a run config.
    """
    lines = _section(section.model_dump(), type(section), parts, True, _WIDTH)
    return "".join(f"{line}\n" for line in lines)


def _section(
    tree: Mapping[str, Any], kind: type[BaseModel], parts: Mapping[str, type[BaseModel]], comment: bool, width: int
) -> list[str]:
    lines = []
    for key, value in tree.items():
        field = kind.model_fields[key]
        inner = parts.get(key) or section_of(field.annotation)
        if inner is None or not value:
            own = yaml_lines(key, value, width)
        elif isinstance(value, list):
            items = [_section(item, inner, {}, comment and not place, width - 2) for place, item in enumerate(value)]
            own = [f"{key}:", *(line for item in items for line in _indented(item, "- "))]
        elif get_origin(field.annotation) is dict and key not in parts:
            own = [f"{key}:"]
            for place, (label, item) in enumerate(value.items()):
                own += [f"  {yaml_lines(label, None, width)[0].removesuffix(' null')}"]
                own += _indented(_section(item, inner, {}, comment and not place, width - 4), "    ")
        else:
            own = [f"{key}:", *_indented(_section(value, inner, {}, comment, width - 2), "  ")]
        header = own[0] if len(own) == 1 else f"{key}:"
        if not comment or field.description is None:
            lines += own
        elif own[0] == header and len(behind := f"{header}  # {field.description}") <= width:
            lines += [behind, *own[1:]]
        else:
            text = f"# {field.description}"
            lines += [*textwrap.wrap(text, width, subsequent_indent="# ", break_on_hyphens=False), *own]
    return lines


def _indented(lines: list[str], first: str) -> list[str]:
    return [f"{first if place == 0 else ' ' * len(first)}{line}" for place, line in enumerate(lines)]
