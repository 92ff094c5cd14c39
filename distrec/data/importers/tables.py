"""Importer `tables`: interactions, items, images and features in CSV, TSV, Parquet and .npy files."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from distrec.config import Section
from distrec.data.importers.base import Columns, RawDataset, interactions, read_ids
from distrec.data.importers.content import (
    ImagesInTable,
    images_in_folder,
    parse_template,
    strings,
    template_columns,
    texts,
)
from distrec.data.importers.features import FeatureFiles, read_feature
from distrec.data.importers.source import Files, Rows, Source
from distrec.errors import InputError


class InteractionsTable(Section):
    """Files and columns of the interactions."""

    files: Files = Field(description="file name, list of names, or patterns such as ratings-*.csv")
    user: str = Field("user", description="column of user ids")
    item: str = Field("item", description="column of item ids")
    rating: str | None = Field(None, description="column of ratings; null if there is none")
    timestamp: str | None = Field(None, description="column of times; null if there is none")
    split: str | None = Field(
        None, description="column of a given split, with values train, valid, test or 0, 1, 2; null if there is none"
    )


class ItemsTable(Section):
    """Files and columns of the items, with one row per item."""

    files: Files = Field(description="file name, list of names, or patterns such as items-*.csv")
    id: str = Field("item", description="column of item ids")
    title: str | None = Field(None, description="column of titles, which are only shown; null if there is none")
    text: str | None = Field(
        None,
        description='template over columns for the text of an item, such as "{title}. {description}"; null: no text',
    )
    text_only_if: dict[str, str] = Field(
        {}, description="for a column of 'text', the Boolean column that must be true for it to be used"
    )
    image: str | None = Field(
        None, description='template over columns for an image file, such as "pictures/{item}.jpg"; null: no files'
    )

    @field_validator("text", "image")
    @classmethod
    def _template(cls, template: str | None) -> str | None:
        if template is not None:
            parse_template(template)
        return template


class ImagesTable(Section):
    """Parquet files with a column of encoded images (JPEG, PNG, …), at most one per item."""

    files: Files = Field(description="file name, list of names, or patterns such as posters-*.parquet")
    id: str = Field("item", description="column of item ids")
    column: str = Field("image", description="column of encoded images, such as JPEG or PNG")


class Config(Section):
    """`importer:` of a data config with `name: tables`."""

    name: Literal["tables"] = Field(description="tables reads CSV, TSV, Parquet and .npy files")
    interactions: InteractionsTable = Field(description="files and columns of the interactions")
    items: ItemsTable | None = Field(
        None, description="files and columns of the items, one row per item; null: items are those of the interactions"
    )
    images: ImagesTable | None = Field(
        None, description="files of images in Parquet, at most one image per item; null if there are none"
    )
    features: dict[str, FeatureFiles] = Field({}, description="files of each precomputed feature set, by its name")


def read(source: Source, config: Config) -> RawDataset:
    """Read the source. Images and features stay on disk.

    Raises:
        InputError: a file, column, id or value of the source is missing or invalid.
    """
    columns = config.interactions
    names = Columns(columns.user, columns.item, columns.rating, columns.timestamp, columns.split)
    files = source.files(columns.files, "importer.interactions.files")
    rows = source.table(files, names.names(), text=[columns.user, columns.item])
    if config.items is None:
        by_row = [name for name, feature in config.features.items() if feature.id is None]
        if by_row:
            raise InputError(
                f"key 'importer.features.{by_row[0]}' gives features by row, but no items table says which item each "
                "row belongs to; add importer.items."
            )
        raw, catalogue_row = interactions(rows, names, None, "")
        return _with_content(source, config, RawDataset(raw, catalogue_row), raw.item_ids, None, "the interactions")
    items, ids = _items(source, config.items)
    where = f"the {len(ids)} items of {items.name}"
    raw, catalogue_row = interactions(rows, names, ids, where)
    return _with_content(source, config, RawDataset(raw, catalogue_row), ids, items, where)


def _items(source: Source, config: ItemsTable) -> tuple[Rows, pa.Array]:
    """The items table and its ids; refuses an id that occurs twice."""
    in_text = template_columns(config.text)
    for column in config.text_only_if:
        if column not in in_text:
            raise InputError(
                f"key 'importer.items.text_only_if' names '{column}', which the text does not use; it uses "
                f"{', '.join(in_text) or 'no column'}."
            )
    columns = [config.id, *in_text, *config.text_only_if.values(), *template_columns(config.image)]
    columns += [config.title] if config.title else []
    rows = source.table(source.files(config.files, "importer.items.files"), columns, text=columns)
    ids = read_ids(rows, config.id).combine_chunks()
    order = pc.sort_indices(ids)
    in_order = ids.take(order)
    same = pc.equal(in_order[1:], in_order[:-1]).to_numpy(zero_copy_only=False)
    if same.any():
        first, second = sorted(order[int(i)].as_py() for i in np.flatnonzero(same)[0] + np.arange(2))
        raise InputError(
            f"{rows.at(second)}: {config.id} {ids[second]} appears a second time (first in {rows.at(first)}); keep one "
            "row per item."
        )
    return rows, ids


def _with_content(
    source: Source, config: Config, raw: RawDataset, catalogue: pa.Array, items: Rows | None, where: str
) -> RawDataset:
    title = text = images = None
    notes: list[str] = []
    if items is not None and config.items is not None:
        title = strings(items, config.items.title) if config.items.title else None
        text = texts(items, config.items.text, config.items.text_only_if) if config.items.text else None
        if config.items.image is not None:
            if config.images is not None:
                raise InputError("keys 'importer.items.image' and 'importer.images' both give images; remove one.")
            images, notes = images_in_folder(source, items, catalogue, config.items.image, "importer.items.image")
    if config.images is not None:
        files = source.files(config.images.files, "importer.images.files")
        images = ImagesInTable(source, files, config.images.id, config.images.column, catalogue)
    features = {
        name: read_feature(source, name, feature, catalogue, where) for name, feature in config.features.items()
    }
    return RawDataset(raw.interactions, raw.catalogue_row, title, text, images, features, notes)
