"""Kinds of table files: what the ending of a name says, and the settings that say otherwise."""

from __future__ import annotations

import codecs
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from distrec.config import Section, nearest
from distrec.errors import InputError

Files = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""Config type: one file name, a list of them, or patterns such as `posters-*.parquet`."""

Quoting = Literal["standard", "backslash", "none"]

_DELIMITERS = {".csv": ",", ".tsv": "\t", ".inter": "\t", ".item": "\t", ".user": "\t"}
_ATOMIC = (".inter", ".item", ".user")  # RecBole's atomic files: tabs, no quotes, headings such as `user_id:token`
_JSON = (".jsonl", ".ndjson", ".json")
_TYPED = re.compile(r":(token|token_seq|float|float_seq)$")
_DELIMITED_ONLY = ("delimiter", "quoting", "heading", "bad_rows")


class TableFiles(Section):
    """Files that make up one table, and how they are read where their endings do not say it."""

    files: Files = Field(description="file name, list of names, or patterns such as ratings-*.csv")
    delimiter: str | None = Field(
        None,
        description='text between two values, such as ";" or "::"; null: by ending, a comma in .csv, a tab in others',
    )
    quoting: Quoting | None = Field(
        None,
        description='standard: "" in "…" is a quote, and values may have several lines; backslash: also \\"; '
        'none: " is text; null: by ending',
    )
    encoding: str | None = Field(
        None, description="encoding of text files, such as latin-1; null: UTF-8, or UTF-16 with a byte order mark"
    )
    heading: list[str] | None = Field(
        None, min_length=1, description="names of the columns, for files whose first line is data; null: the first line"
    )
    bad_rows: Literal["refuse", "drop"] = Field(
        "refuse",
        description="what to do with rows that have too few or too many values: refuse, or drop and count them",
    )

    @property
    def ids(self) -> tuple[str, ...]:
        """The columns of ids."""
        return ()

    @field_validator("delimiter")
    @classmethod
    def _delimiter(cls, value: str | None) -> str | None:
        if value is not None and (not value or set(value) & set('"\r\n\0\\')):
            raise ValueError("must be at least one character and hold no quote, backslash or line break")
        return value

    @field_validator("encoding")
    @classmethod
    def _encoding(cls, value: str | None) -> str | None:
        try:
            if value is not None:
                "a".encode(value)
                codecs.getincrementaldecoder(value)
        except (LookupError, ValueError, UnicodeError):
            raise ValueError("is not a text encoding that Python knows; see its module codecs for names") from None
        return value

    @field_validator("heading")
    @classmethod
    def _heading(cls, value: list[str] | None) -> list[str] | None:
        twice = repeated(value or [])
        if twice is not None:
            raise ValueError(f"names '{twice}' twice; give each column a name of its own")
        return value


@dataclass(frozen=True)
class Form:
    """How one file of a table is read."""

    name: str
    kind: Literal["parquet", "json", "delimited"]
    packed: bool  # gzip
    delimiter: str
    quoting: Quoting
    atomic: bool  # headings hold types: `title:token_seq`
    options: TableFiles
    key: str  # dotted key of the options, for messages; empty if the config has none

    def setting(self, assignment: str, otherwise: str) -> str:
        """The remedy "set 'KEY.SETTING: VALUE'", or `otherwise` if the config cannot set it."""
        return f"set '{self.key}.{assignment}'" if self.key else otherwise


def form(name: str, options: TableFiles, key: str) -> Form:
    """The form of file `name`, by its ending in lower or upper case and by `options`, which are at `key`.

    Raises:
        InputError: the ending is unknown, or an option does not apply to such a file.
    """
    plain = name.lower().removesuffix(".gz")
    packed, ending = plain != name.lower(), posixpath.splitext(plain)[1]
    kind: Literal["parquet", "json", "delimited"] = "delimited"
    if ending == ".parquet" and not packed:
        kind = "parquet"
    elif ending in _JSON:
        kind = "json"
    elif ending not in _DELIMITERS and options.delimiter is None:
        other = f", or set '{key}.delimiter' for other text" if key else ""
        raise InputError(
            f"file '{name}' is not a table of a known kind; give .parquet, .csv, .tsv, .inter, .item, .user, .jsonl or "
            f".json (text also as .gz){other}."
        )
    barred = () if kind == "delimited" else _DELIMITED_ONLY if kind == "json" else (*_DELIMITED_ONLY, "encoding")
    for option in barred:
        if (
            option in options.model_fields_set
            and getattr(options, option) != type(options).model_fields[option].default
        ):
            what = "JSON lines" if kind == "json" else "Parquet"
            raise InputError(f"key '{key}.{option}' does not apply to '{name}', which is {what}; remove the key.")
    delimiter = options.delimiter or _DELIMITERS.get(ending, ",")
    quoting = options.quoting or ("standard" if ending == ".csv" and len(delimiter.encode()) == 1 else "none")
    if quoting != "none" and len(delimiter.encode()) > 1:
        raise InputError(
            f"key '{key}.quoting' is '{quoting}' but the delimiter {delimiter!r} is longer than one ASCII character; "
            "use 'none' or a shorter delimiter."
        )
    return Form(name, kind, packed, delimiter, quoting, ending in _ATOMIC, options, key)


def plain_name(column: str) -> str:
    """A name of a column without RecBole's type: `title` for `title:token_seq`."""
    return _TYPED.sub("", column)


def actual(column: str, names: Sequence[str]) -> str | None:
    """Which of the `names` of a file a `column` of the config means: the same one, or else the one without its type."""
    return next((name for name in (column, plain_name(column)) if name in names), None)


def closest(column: str, names: Sequence[str]) -> str:
    """A phrase that suggests a name for a `column` that a file lacks."""
    return nearest(next((name for name in names if plain_name(name) == column), column), names)


def repeated(names: list[str]) -> str | None:
    """The first name that occurs twice, or None. Columns without a name are not compared."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        if name:
            seen.add(name)
    return None
