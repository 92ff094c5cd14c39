"""Titles and small pictures of the items that the page shows."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from typing import Any

from distrec.data.dataset import Dataset
from distrec.data.pictures import Undecodable, open_picture
from distrec.errors import InputError

_SIDE = 112  # pixels; the page shows half as many, so that pictures are sharp on high-resolution screens
_QUALITY = 72


@dataclass(frozen=True)
class Items:
    """Titles and pictures of the items shown, by item. `note` says what is missing and why."""

    titles: dict[int, str] = field(default_factory=dict)
    pictures: dict[int, str] = field(default_factory=dict)  # data: URLs
    note: str | None = None


def read_items(report: dict[str, Any]) -> Items:
    """Title and picture of every item in the examples of a report, as `gather` returns it.

    Titles are those that the runs recorded; pictures are read from the dataset.
    """
    named = {item["item"]: str(item["title"] or f"item {item['id']}") for item in report["items"]}
    if not named:
        return Items()
    path, recorded = report["data"].get("path"), report["data"].get("hash")
    try:
        data = Dataset.open(str(path))
        if recorded is not None and data.hash != recorded:
            return Items(named, note=f"The dataset at {path} has changed since the sweep, so no pictures are shown.")
        if not data.manifest.content.get("image"):
            return Items(named, note="The dataset has no pictures.")
        rows = {row["item"]: row["image"] for row in data.content_of(sorted(named), ["image"])}
    except (InputError, OSError, IndexError) as error:
        told = str(error).partition("\n")[0]
        return Items(named, note=f"The dataset can no longer be read, so no pictures are shown ({told}).")
    small = {item: url for item, image in rows.items() if image and (url := thumbnail(image))}
    lacking = len(named) - len(small)
    return Items(named, small, f"{lacking} of the {len(named)} items shown have no picture." if lacking else None)


def thumbnail(image: bytes) -> str | None:
    """A picture as a small JPEG in a `data:` URL; None if it cannot be decoded."""
    try:
        small = open_picture(image)
    except Undecodable:
        return None
    small.thumbnail((_SIDE, _SIDE))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
