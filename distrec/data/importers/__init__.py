"""Importers. Each reads a source folder, according to its own config section, into a `RawDataset`.

To add one: a module with a `Config` section and `read(source, config) -> RawDataset`, and a line in `IMPORTERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distrec.config import Section, decode, nearest
from distrec.data.importers import mmrec, recbole, tables
from distrec.data.importers.base import RawDataset, RawFeature, RawInteractions
from distrec.data.importers.source import Source
from distrec.errors import InputError, shown

__all__ = ["IMPORTERS", "Importer", "RawDataset", "RawFeature", "RawInteractions", "Source", "choose_importer"]


@dataclass(frozen=True)
class Importer:
    """An importer's config section and its function that reads a source."""

    config: type[Section]
    read: Callable[[Source, Any], RawDataset]


IMPORTERS = {
    "tables": Importer(tables.Config, tables.read),
    "recbole": Importer(recbole.Config, recbole.read),
    "mmrec": Importer(mmrec.Config, mmrec.read),
}


def choose_importer(tree: dict[str, Any]) -> tuple[Importer, Section]:
    """The importer that `tree` names, and its decoded config.

    Raises:
        InputError: there is no importer of that name, or its section has an invalid key or value.
    """
    name = tree.get("name")
    if not isinstance(name, str) or name not in IMPORTERS:
        raise InputError(f"key 'importer.name' is {shown(name)}; {nearest(str(name), list(IMPORTERS))}.")
    importer = IMPORTERS[name]
    return importer, decode(importer.config, tree, "importer")
