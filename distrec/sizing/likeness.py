"""Small datasets that are like a large one in all that decides about memory, for rehearsals.

Users, items and interactions are the same share of the large one's, so that users have as many items. Feature sets have
the same names, widths and numbers of tokens. Their content is random. Only so many users have held-out items that
ranking them takes seconds.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from contextlib import redirect_stdout

import numpy as np
import pyarrow as pa

from distrec.data import keyed
from distrec.data.dataset import Dataset, group_rows, vector_table, write_part
from distrec.data.manifest import SPLITS, FeatureEntry, Manifest, write_manifest
from distrec.data.parts import Parts, items_per_part
from distrec.data.storage import open_folder
from distrec.data.synth import FEWEST, GraphSize, write_graph

_KEY = "likeness"
MOST_SCORES = 2e9  # of users and items in an evaluation: some ten seconds on one core


def share_of(manifest: Manifest, share: float) -> GraphSize:
    """The size of a dataset that is `share` (0 to 1) of another in users, items and interactions."""
    users, items = (max(4 * FEWEST, round(share * rows)) for rows in (manifest.users, manifest.items))
    edges = round(share * sum(manifest.interactions.values()))
    return GraphSize(users, items, min(max(edges, FEWEST * users), users * items // 4), dim=1, image_dim=1)


def write_likeness(out: str, manifest: Manifest, size: GraphSize) -> Dataset:
    """Write a dataset of `size` with the feature sets of `manifest` to the new folder `out`."""
    with redirect_stdout(io.StringIO()):  # the line about what was written
        data = write_graph(out, size)
    _hold_out_fewer(data, math.ceil(size.users * size.items / MOST_SCORES))
    return add_features(out, manifest.features)


def _hold_out_fewer(data: Dataset, every: int) -> None:
    """Keep the held-out rows of one user of `every` only."""
    if every == 1:
        return
    folder, manifest = data.folder, data.manifest
    files, counts = dict(manifest.files), dict(manifest.interactions)
    for split in SPLITS[1:]:
        rows = data.interactions(split)
        kept = rows.user % every == 0
        prefix = f"interactions/{split}/"
        for name in [name for name in files if name.startswith(prefix)]:
            folder.remove(*name.split("/"))
            del files[name]
        table = pa.table({name: getattr(rows, name)[kept] for name in ("user", "item", "timestamp")})
        files[f"{prefix}part-00000.parquet"] = write_part(folder, f"{prefix}part-00000.parquet", table)
        counts[split] = table.num_rows
    write_manifest(folder, manifest.model_copy(update={"interactions": counts, "files": dict(sorted(files.items()))}))


def add_features(out: str, features: Mapping[str, FeatureEntry]) -> Dataset:
    """Replace the feature sets of the dataset in `out` by random ones with the shapes of `features`."""
    folder, data = open_folder(out), Dataset.open(out, checked=True)
    manifest = data.manifest
    files = {name: entry for name, entry in manifest.files.items() if not name.startswith("features/")}
    entries = {}
    for name, entry in features.items():
        numbers = entry.tokens * entry.width
        row = np.dtype(entry.dtype).itemsize * numbers
        parts = Parts(folder, f"features/{name}", items_per_part(row), group_rows=group_rows(row))
        for start in range(0, data.items, parts.rows):
            stop = min(start + parts.rows, data.items)
            values = keyed.uniform_rows((_KEY, name), range(start, stop), numbers).astype(entry.dtype) - 0.5
            present = np.zeros(stop - start, bool)
            count = np.full(stop - start, entry.tokens, np.int32) if entry.tokens > 1 else None
            parts.add(vector_table(start, values.astype(entry.dtype), present, count))
        files |= parts.close()
        entries[name] = entry.model_copy(update={"missing": 0, "parts": list(parts.files)})
    write_manifest(folder, manifest.model_copy(update={"features": entries, "files": dict(sorted(files.items()))}))
    return Dataset.open(out, checked=True)
