"""Importer `tables`: interactions, items, images and features in delimited text, JSON lines, Parquet and .npy files."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from distrec.config import Section
from distrec.data.importers.base import (
    Catalogue,
    Columns,
    ImageReader,
    RawDataset,
    RawFeature,
    Unknown,
    interactions,
    read_ids,
)
from distrec.data.importers.content import (
    ImagesInTable,
    images_in_folder,
    parse_template,
    strings,
    template_columns,
    texts,
)
from distrec.data.importers.delimited import enclosed
from distrec.data.importers.features import FeatureFiles, read_feature, with_missing
from distrec.data.importers.formats import form
from distrec.data.importers.source import Files, Rows, Source, TableFiles
from distrec.data.importers.values import first_true
from distrec.data.manifest import FeatureName
from distrec.errors import InputError, shown


class InteractionsTable(TableFiles):
    """Files and columns of the interactions."""

    user: str = Field("user", description="column of user ids")
    item: str = Field("item", description="column of item ids")
    rating: str | None = Field(None, description="column of ratings; null if there is none")
    timestamp: str | None = Field(None, description="column of times; null if there is none")
    split: str | None = Field(
        None, description="column of a given split, with values train, valid, test or 0, 1, 2; null if there is none"
    )
    unknown_items: Unknown = Field(
        "refuse",
        description="what happens to rows whose item the items table lacks: refuse, drop, or keep it without content",
    )

    @property
    def ids(self) -> tuple[str, ...]:
        """The columns of ids."""
        return self.user, self.item


class ItemsTable(TableFiles):
    """Files and columns of the items, with one row per item."""

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

    @property
    def ids(self) -> tuple[str, ...]:
        """The column of ids."""
        return (self.id,)

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

    name: Literal["tables"] = Field(description="tables reads delimited text, JSON lines, Parquet and .npy files")
    interactions: InteractionsTable = Field(description="files and columns of the interactions")
    items: ItemsTable | None = Field(
        None, description="files and columns of the items, one row per item; null: items are those of the interactions"
    )
    images: ImagesTable | None = Field(
        None, description="files of images in Parquet, at most one image per item; null if there are none"
    )
    features: dict[FeatureName, FeatureFiles] = Field(
        {}, description="files of each precomputed feature set, by its name"
    )


def read(source: Source, config: Config) -> RawDataset:
    """Read the source. Images and features stay on disk.

    Raises:
        InputError: a file, column, id or value of the source is missing or invalid.
    """
    return read_tables(source, config, "importer.")


def read_tables(source: Source, config: Config, prefix: str) -> RawDataset:
    """As `read`, for an importer whose config has other keys: with an empty `prefix`, messages name none of these."""
    columns = config.interactions
    names = Columns(columns.user, columns.item, columns.rating, columns.timestamp, columns.split)
    files = source.files(columns.files, "importer.interactions.files")
    key = prefix and f"{prefix}interactions"
    rows = source.table(files, names.names(), columns, key)
    _refuse_half_quoted(rows, columns, key)
    items, catalogue, where = None, None, "the interactions"
    if config.items is not None:
        items, ids = _items(source, config.items, prefix and f"{prefix}items")
        where = f"the {len(ids)} items of {items.name}"
        unknown = f"{prefix}interactions.unknown_items" if prefix else "importer.unknown_items"
        catalogue = Catalogue(ids, where, columns.unknown_items, unknown)
    elif columns.unknown_items != "refuse":
        raise InputError("key 'importer.interactions.unknown_items' needs an items table; add importer.items.")
    by_row = [name for name, feature in config.features.items() if feature.id is None]
    if by_row and items is None:
        raise InputError(
            f"key 'importer.features.{by_row[0]}' gives features by row, but no items table says which item each row "
            "belongs to; add importer.items."
        )
    found = interactions(rows, names, catalogue)
    features = {
        name: _feature(source, name, feature, found.ids, items, where) for name, feature in config.features.items()
    }
    titles, texts_, images, absent = _content(source, config, found.ids, items)
    notes = [*rows.notes, *([] if items is None else items.notes), *found.notes, *absent]
    return RawDataset(found.interactions, found.catalogue_row, titles, texts_, images, features, notes)


def _items(source: Source, config: ItemsTable, key: str) -> tuple[Rows, pa.Array]:
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
    rows = source.table(source.files(config.files, "importer.items.files"), columns, config, key)
    _refuse_half_quoted(rows, config, key)
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


def _refuse_half_quoted(rows: Rows, config: TableFiles, key: str) -> None:
    """Refuse ids of which only some are in quotation marks, where these are text."""
    forms = [form(name, config, key) for name, _ in rows.files]
    bare = next((one for one in forms if one.kind == "delimited" and one.quoting == "none"), None)
    if bare is None or rows.typed:
        return
    for column in config.ids:
        within = enclosed(rows.table[column])
        count = pc.sum(within).as_py() or 0
        if within.null_count or count in (0, len(within)):  # a missing id is refused later
            continue
        few = 2 * count <= len(within)
        row = first_true(within if few else pc.invert(within))
        remedy = "write all of them without marks"
        if len(bare.delimiter.encode()) == 1:
            remedy = bare.setting("quoting: standard", remedy)
        raise InputError(
            f"{rows.at(row)}: {column} is {shown(rows.table[column][row], quoted=False)}, but "
            f"{len(within) - count if few else count:,} of {len(within):,} ids are {'not ' * few}in quotation marks; "
            f"{remedy}."
        )


def _feature(
    source: Source, name: str, config: FeatureFiles, ids: pa.Array, items: Rows | None, where: str
) -> RawFeature:
    """A feature set for items `ids`, of which the items table, if there is one, holds the first."""
    known = len(ids) if items is None or config.id is not None else items.table.num_rows
    return with_missing(source, name, read_feature(source, name, config, ids[:known], where), len(ids) - known)


def _content(
    source: Source, config: Config, ids: pa.Array, items: Rows | None
) -> tuple[pa.Array | None, pa.Array | None, ImageReader | None, list[str]]:
    """Titles, texts and images of items `ids`, of which the items table holds the first; the others have none.

    Also notes on images that are absent.
    """
    title = text = None
    images: ImageReader | None = None
    notes: list[str] = []
    if items is not None and config.items is not None:
        none = pa.nulls(len(ids) - items.table.num_rows, pa.string())
        if config.items.title:
            title = pa.concat_arrays([strings(items, config.items.title), none])
        if config.items.text:
            text = pa.concat_arrays([texts(items, config.items.text, config.items.text_only_if), none])
        if config.items.image is not None:
            if config.images is not None:
                raise InputError("keys 'importer.items.image' and 'importer.images' both give images; remove one.")
            known = ids[: items.table.num_rows]
            read_image, notes = images_in_folder(source, items, known, config.items.image, "importer.items.image")
            images = _of_first(read_image, items.table.num_rows)
    if config.images is not None:
        files = source.files(config.images.files, "importer.images.files")
        images = ImagesInTable(source, files, config.images.id, config.images.column, ids)
    return title, text, images, notes


def _of_first(images: ImageReader, count: int) -> ImageReader:
    """A reader for which only the first `count` items can have an image."""

    def read_known(wanted: np.ndarray) -> list[bytes | None]:
        found = iter(images(wanted[wanted < count]))
        return [next(found) if known else None for known in wanted < count]

    return read_known
