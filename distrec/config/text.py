"""The texts that users write: YAML configs and JSON files, read within bounds, and YAML that reads back as itself.

Unquoted values mean what the core schema of YAML 1.2 says (https://yaml.org/spec/1.2.2/#103-core-schema): `yes`,
`1:30`, `1_000` and `2021-01-01` are strings. Numbers that could be misread are refused: `010`, which YAML 1.1 reads as
8, integers beyond 64 bits, and numbers that float64 cannot hold. A mapping's keys are different strings.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from distrec.config.bounds import MOST_BYTES, MOST_DEPTH, MOST_VALUES
from distrec.config.paths import PATH_WIDTH, local_path, unwritable
from distrec.errors import InputError, shown

_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_AMBIGUOUS = re.compile(r"[-+]?0[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {
    **{word: None for word in ("", "~", "null", "Null", "NULL")},
    **{word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")},
    **{f"{sign}{word}": float(f"{sign}inf") for sign in ("", "-", "+") for word in (".inf", ".Inf", ".INF")},
    **{word: math.nan for word in (".nan", ".NaN", ".NAN")},
}
_STRING = "tag:yaml.org,2002:str"
_MERGE = "<<"


class _Problem(Exception):
    """What is wrong with a text, the remedy, and the line, counted from 0."""

    def __init__(self, what: str, remedy: str, line: int = 0):
        super().__init__(what)
        self.what, self.remedy, self.line = what, remedy, line


def read_yaml(text: bytes | str, where: str) -> Any:
    """The value of a YAML text; None if it is empty.

    Args:
        text: the text, or its bytes in UTF-8.
        where: the name of the text in errors, such as "config file 'a.yaml'".

    Raises:
        InputError: the text is not YAML, exceeds a bound, holds a value that could be misread, or is none of plain
            values, lists and mappings with strings as keys. The message names the line if the text has several.
    """
    text = _decoded(text, where)
    several = "\n" in text.strip()
    try:
        return _Reader(text).document()
    except _Problem as problem:
        place = f" (line {problem.line + 1})" if several else ""
        message = f"{where}: {problem.what}{place}; {problem.remedy}."
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem_text = getattr(error, "problem", None) or str(error).splitlines()[0]
        place = f" (line {mark.line + 1})" if mark and several else ""
        message = f"{where} is not valid YAML: {problem_text}{place}; fix it or quote it."
    raise InputError(message)


def read_json(text: bytes | str, where: str, remedy: str = "") -> Any:
    """The value of a JSON text.

    Args:
        text: the text, or its bytes in UTF-8.
        where: the name of the text in errors, such as "file 'a.json'".
        remedy: what to do about a bad one, if there is more to say than to fix it.

    Raises:
        InputError: the text is not JSON, is nested too deeply, or holds a number that is not finite or a string that no
            text file can hold.
    """

    def refuse(number: str) -> None:
        raise ValueError(f"the number {number} is not finite")

    text = _decoded(text, where, remedy)
    try:
        value = json.loads(text, parse_constant=refuse)
        _check_json(value, 1)
    except RecursionError:
        problem: object = f"it is nested more than {MOST_DEPTH} deep"
    except ValueError as error:
        problem = error
    else:
        return value
    raise InputError(f"{where} is not valid JSON: {problem}; {remedy or 'fix it'}.")


def _check_json(value: Any, depth: int) -> None:
    if depth > MOST_DEPTH:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is beyond the range of float64")
    if isinstance(value, str) and (bad := unwritable(value)) is not None:
        raise ValueError(f"a string holds the character {bad!a}")
    inside = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    for inner in inside:
        _check_json(inner, depth + 1)


def read_file(path: str | Path, what: str) -> bytes:
    """The bytes of a small local file that a user wrote; `what` says which file it is, such as "config file".

    Raises:
        InputError: the path is not local, or is no readable file, or the file is larger than any config.
    """
    name = shown(str(path), PATH_WIDTH)
    file = Path(local_path(str(path), what))

    def open_at_once(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK)  # a named pipe that nobody writes to would block

    try:
        if file.is_char_device() or file.is_block_device():
            raise InputError(f"{what} {name} is a device; give the path of a file.")
        with open(file, "rb", opener=open_at_once) as opened:
            os.set_blocking(opened.fileno(), True)  # a shell's <(command) is a pipe that is still being written
            content = opened.read(MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"{what} {name} cannot be read ({error.strerror}); give the path of a file.") from None
    if len(content) > MOST_BYTES:
        raise InputError(f"{what} {name} is larger than {MOST_BYTES:,} bytes; give the right file.")
    return content


def _decoded(text: bytes | str, where: str, remedy: str = "") -> str:
    remedy = remedy or "save it as UTF-8"
    if isinstance(text, bytes):
        if text.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise InputError(f"{where} is UTF-16, not UTF-8; {remedy}.")
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise InputError(
                f"{where} is not UTF-8 (byte 0x{error.object[error.start]:02x} in line {line}); {remedy}."
            ) from None
    if (bad := unwritable(text)) is not None:
        raise InputError(f"{where} holds the character {bad!a}, so it is no text in UTF-8; {remedy}.")
    return text


class _Reader:
    """Builds the value of a text from the parser's events, so that a bound is noticed before anything large exists.

    A value is held with its size and height: the number of values in it, itself included, and its levels. Both count
    an alias as what it stands for.
    """

    def __init__(self, text: str):
        self._events = yaml.parse(text, Loader=yaml.SafeLoader)
        self._anchors: dict[str, tuple[Any, int, int] | None] = {}  # None: not finished yet
        self._built = 0

    def _next(self) -> Any:
        return next(self._events)

    def document(self) -> Any:
        value = None
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                value = self._value(self._next(), 1)[0]
                self._next()
                if not isinstance(self._next(), yaml.StreamEndEvent):
                    raise _Problem("it holds several documents, separated by '---'", "keep one of them")
                break
        return value

    def _value(self, event: Any, depth: int) -> tuple[Any, int, int]:
        line = event.start_mark.line
        if depth > MOST_DEPTH:
            raise _Problem(f"values are nested more than {MOST_DEPTH} deep", "flatten them", line)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, depth, line)
        if event.tag is not None:
            raise _Problem(f"the tag {shown(event.tag)} is not supported", "write the plain value", line)
        self._count(1, line)
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            if (bad := unwritable(event.value)) is not None:
                raise _Problem(f"a string holds the character {bad!a}", "remove it", line)
            out = (plain_value(event.value, line) if event.implicit[0] else event.value), 1, 1
        else:
            build = self._mapping if isinstance(event, yaml.MappingStartEvent) else self._list
            inner, sizes, heights = build(depth)
            out = inner, 1 + sum(sizes), 1 + max(heights, default=0)
        if event.anchor is not None:
            self._anchors[event.anchor] = out
        return out

    def _count(self, values: int, line: int) -> None:
        self._built += values
        if self._built > MOST_VALUES:
            raise _Problem(
                f"it holds more than {MOST_VALUES:,} values, with every alias written out", "write fewer", line
            )

    def _alias(self, event: Any, depth: int, line: int) -> tuple[Any, int, int]:
        if event.anchor not in self._anchors:
            raise _Problem(f"the alias *{shown(event.anchor)} has no anchor before it", "define it, or quote it", line)
        found = self._anchors[event.anchor]
        if found is None:
            raise _Problem(f"the anchor {shown(event.anchor)} contains itself", "write the value out", line)
        _, size, height = found
        self._count(size, line)
        if depth + height - 1 > MOST_DEPTH:
            raise _Problem(f"values are nested more than {MOST_DEPTH} deep", "flatten them", line)
        return found

    def _list(self, depth: int) -> tuple[list[Any], list[int], list[int]]:
        found = []
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            found.append(self._value(event, depth + 1))
        return [value for value, _, _ in found], [size for _, size, _ in found], [height for *_, height in found]

    def _mapping(self, depth: int) -> tuple[dict[str, Any], list[int], list[int]]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        sizes, heights = [], []
        seen = set()
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            line = event.start_mark.line
            key, merge = self._key(event, depth + 1, line)
            if (key, merge) in seen:
                raise _Problem(f"key {shown(key)} appears twice", "remove one of them", line)
            seen.add((key, merge))
            value, size, height = self._value(self._next(), depth + 1)
            sizes.append(1 + size)
            heights.append(height)
            if merge:
                merged = _merged(value, line)
            else:
                own[key] = value
        return {**merged, **own}, sizes, heights

    def _key(self, event: Any, depth: int, line: int) -> tuple[str, bool]:
        """A key, and whether it is `<<`, which merges other mappings into this one."""
        if isinstance(event, yaml.ScalarEvent) and event.tag is None and event.implicit[0] and event.value == _MERGE:
            return _MERGE, True
        if not isinstance(event, yaml.ScalarEvent | yaml.AliasEvent):
            raise _Problem(
                "a list or mapping is used as a key, as in a template {{ … }} that was not filled in",
                "fill it in, or quote the value",
                line,
            )
        key = self._value(event, depth)[0]
        if not isinstance(key, str):
            name = getattr(event, "value", None) or shown(key)
            raise _Problem(f"the key {shown(name)} is not a string", "quote it", line)
        return key, False


def _merged(value: Any, line: int) -> dict[str, Any]:
    """What the key `<<` adds to a mapping; of several mappings, earlier ones win."""
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, Mapping) for part in parts):
        raise _Problem("the key '<<' merges mappings, and its value is something else", "give a mapping", line)
    return {key: inner for part in reversed(parts) for key, inner in part.items()}


def plain_value(text: str, line: int = 0) -> Any:
    """The value of an unquoted YAML scalar."""
    if text in _WORDS:
        return _WORDS[text]
    if _AMBIGUOUS.fullmatch(text):
        digits = text.lstrip("+-0") or "0"
        what = f"the number {shown(text)} could mean {shown(int(digits[:30]))} or an octal number"
        raise _Problem(what, "write it without leading zeros, or quote it", line)
    if _INTEGER.fullmatch(text):
        value = 1 << 64 if len(text) > 32 else int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if not -(1 << 63) <= value < 1 << 63:
            raise _Problem(f"the number {shown(text)} is beyond 64 bits", "write a smaller one, or quote it", line)
        return value
    if _FLOAT.fullmatch(text):
        number = float(text)
        mantissa = re.split("[eE]", text)[0]
        if math.isinf(number) or (number == 0 and mantissa.strip("+-0.")):
            raise _Problem(
                f"the number {shown(text)} is beyond the range of float64", "write another, or quote it", line
            )
        return number
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes every string that `read_yaml` or a reader of YAML 1.1 would take for something else.

    It writes repeated values out.
    """

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        if kind is yaml.ScalarNode and implicit[0] and tag == _STRING and not _is_string(value):
            return None  # another tag than the string's, so the emitter quotes it
        return tag


def _is_string(text: str) -> bool:
    try:
        return isinstance(plain_value(text), str)
    except _Problem:
        return False


def write_yaml(value: Any) -> str:
    """`value` as YAML that `read_yaml` reads back as the same value; lists and mappings take a line per entry."""
    return _dumped(value, False)


def yaml_lines(key: str, value: Any, width: int) -> list[str]:
    """Lines of YAML that read back as `key: value`; inner lists and mappings take one line if they fit."""
    for flow in (None, False) if isinstance(value, (dict, list)) else (False,):
        lines = _dumped({key: value}, flow).splitlines()
        if all(len(line) <= width for line in lines):
            break
    return lines


def _dumped(value: Any, flow: bool | None) -> str:
    text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=flow, sort_keys=False, width=math.inf)
    return text
