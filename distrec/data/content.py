"""Write raw texts and images of a dataset's items, in parts."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from distrec.data import parts
from distrec.data.importers import RawDataset
from distrec.data.manifest import FileEntry
from distrec.data.pictures import shrunk
from distrec.data.storage import Folder

_GROUP = 200  # items per row group
_IMAGES_READ = 20  # items whose images are read at once: those of a source may be large


def write_content(
    folder: Folder, files: dict[str, FileEntry], raw: RawDataset, rows: np.ndarray, side: int | None
) -> tuple[dict[str, int], tuple[int, int]]:
    """Write texts and images in item order, with one part in memory at a time.

    Images larger than `side` are stored with that shorter side; None: unchanged.

    Returns:
        How many items have a text and how many have an image, empty if the source has neither; and the bytes of the
        images as stored and in the source.
    """
    if raw.texts is None and raw.images is None:
        return {}, (0, 0)
    count, stored, read = {"text": 0, "image": 0}, 0, 0
    most = -(-parts.ITEMS_PER_PART // _GROUP) * _GROUP  # whole row groups
    out = parts.Parts(folder, "content", most, group_rows=_GROUP, most_bytes=parts.BYTES_PER_PART)
    step = _GROUP if raw.images is None else _IMAGES_READ
    for start in range(0, len(rows), step):
        at = rows[start : start + step]
        text = pa.nulls(len(at), pa.string()) if raw.texts is None else raw.texts.take(pa.array(at))
        images: list[bytes | None] = [None] * len(at) if raw.images is None else raw.images(at)
        read += sum(len(image) for image in images if image is not None)
        if side is not None:
            images = [None if image is None else shrunk(image, side) for image in images]
        stored += sum(len(image) for image in images if image is not None)
        image = pa.array(images, pa.binary())
        item = pa.array(np.arange(start, start + len(at), dtype=np.int32))
        out.add(pa.table({"item": item, "text": text, "image": image}))
        count["text"] += len(at) - text.null_count
        count["image"] += len(at) - image.null_count
    files |= out.close()
    return count, (stored, read)
