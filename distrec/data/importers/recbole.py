"""Importer `recbole`: a folder of RecBole's atomic files, as RecBole distributes its datasets.

`<dataset>.inter` holds the interactions and, if present, `<dataset>.item` the items: values separated by tabs, without
quotes, and a first line of fields and their types, such as `user_id:token`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from distrec.config import Section
from distrec.data.importers.base import RawDataset, Unknown
from distrec.data.importers.content import parse_template
from distrec.data.importers.source import Source
from distrec.data.importers.tables import Config as Tables
from distrec.data.importers.tables import InteractionsTable, ItemsTable, read_tables
from distrec.errors import InputError

_USER = ("user_id", "userID", "userId", "user")
_ITEM = ("item_id", "itemID", "itemId", "item")


class Config(Section):
    """`importer:` of a data config with `name: recbole`."""

    name: Literal["recbole"] = Field(description="recbole reads RecBole's atomic files")
    dataset: str = Field(description="name of the dataset; the files <dataset>.inter and <dataset>.item hold it")
    title: str | None = Field(None, description="field of titles in the .item file, such as movie_title; null: none")
    text: str | None = Field(
        None, description='template over fields of the .item file, such as "{movie_title}. {class}"; null: no text'
    )
    unknown_items: Unknown = Field(
        "refuse",
        description="what happens to rows whose item the .item file lacks: refuse, drop, or keep it without content",
    )

    @field_validator("text")
    @classmethod
    def _template(cls, template: str | None) -> str | None:
        if template is not None:
            parse_template(template)
        return template


def read(source: Source, config: Config) -> RawDataset:
    """Read the source. Fields of users and items, ratings and times are found by RecBole's usual names.

    Raises:
        InputError: a file or field is missing or a value is invalid.
    """
    (interactions,) = source.files([f"{config.dataset}.inter"], "importer.dataset")
    fields = source.columns(interactions)
    items = None
    if source.has(f"{config.dataset}.item"):
        (name,) = source.files([f"{config.dataset}.item"], "importer.dataset")
        item = _field(name, source.columns(name), _ITEM)
        items = ItemsTable(files=[name], id=item, title=config.title, text=config.text)
    elif config.title or config.text or config.unknown_items != "refuse":
        key = "title" if config.title else "text" if config.text else "unknown_items"
        raise InputError(f"key 'importer.{key}' needs the file '{config.dataset}.item', which is absent; add it.")
    table = InteractionsTable(
        files=[interactions],
        user=_field(interactions, fields, _USER),
        item=_field(interactions, fields, _ITEM),
        rating="rating" if "rating" in fields else None,
        timestamp="timestamp" if "timestamp" in fields else None,
        unknown_items=config.unknown_items,
    )
    return read_tables(source, Tables(name="tables", interactions=table, items=items), "")


def _field(name: str, fields: list[str], usual: tuple[str, ...]) -> str:
    for field in usual:
        if field in fields:
            return field
    raise InputError(
        f"file '{name}' has none of the fields {', '.join(usual)}, only {', '.join(fields)}; use importer "
        "'tables', which takes any names."
    )
