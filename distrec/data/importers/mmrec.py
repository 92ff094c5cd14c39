"""Importer `mmrec`: files of the `enoche/MMRec` benchmark toolbox.

`<dataset>.inter` is a TSV with `userID`, `itemID`, `x_label` (0 train, 1 valid, 2 test) and optionally `rating`
and `timestamp`. `image_feat.npy` and `text_feat.npy`, if present, hold the features of item r in row r.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from distrec.config import Section
from distrec.data.importers.base import Catalogue, Columns, RawDataset, interactions
from distrec.data.importers.features import FeatureFiles, load_npy, read_feature
from distrec.data.importers.source import Source


class Config(Section):
    """`importer:` of a data config with `name: mmrec`."""

    name: Literal["mmrec"] = Field(description="mmrec reads files of the MMRec toolbox")
    dataset: str = Field(description="name of the dataset; the file <dataset>.inter holds its interactions")
    zeros_are_missing: bool = Field(False, description="take a row of zeros for an item without this modality")


def read(source: Source, config: Config) -> RawDataset:
    """Read the source. Its items are the rows of the feature files or, without such files, those of the interactions.

    Raises:
        InputError: a file or column is missing, a value is invalid, or an item has no feature row.
    """
    files = source.files([f"{config.dataset}.inter"], "importer.dataset")
    there = source.columns(files[0])
    rating, timestamp = (name if name in there else None for name in ("rating", "timestamp"))
    names = Columns("userID", "itemID", rating, timestamp, "x_label")
    rows = source.table(files, names.names())
    kinds = [kind for kind in ("image", "text") if source.has(f"{kind}_feat.npy")]
    if not kinds:
        found = interactions(rows, names, None)
        return RawDataset(found.interactions, found.catalogue_row, notes=[*rows.notes, *found.notes])
    paths = {
        kind: FeatureFiles(files=[f"{kind}_feat.npy"], zeros_are_missing=config.zeros_are_missing) for kind in kinds
    }
    items = len(load_npy(source, f"{kinds[0]}_feat.npy"))
    catalogue = pa.array(np.arange(items))
    where = f"the {items} rows of '{kinds[0]}_feat.npy'"
    features = {kind: read_feature(source, kind, paths[kind], catalogue, where) for kind in kinds}
    found = interactions(rows, names, Catalogue(catalogue, where))
    return RawDataset(found.interactions, found.catalogue_row, features=features, notes=[*rows.notes, *found.notes])
