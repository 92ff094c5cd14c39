"""Small datasets that are like a large one in all that decides about memory, for rehearsals.

Users, items and interactions are the same share of the large one's, so that users have as many items. Feature sets have
the same names, widths and numbers of tokens. Their content is random.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout

import numpy as np

from distrec.data import keyed
from distrec.data.dataset import Dataset, group_rows, vector_table
from distrec.data.manifest import FeatureEntry, Manifest, write_manifest
from distrec.data.parts import Parts, items_per_part
from distrec.data.storage import open_folder
from distrec.data.synth import FEWEST, GraphSize, write_graph

_KEY = "likeness"


def share_of(manifest: Manifest, share: float) -> GraphSize:
    """The size of a dataset that is `share` (0 to 1) of another in users, items and interactions."""
    users, items = (max(4 * FEWEST, round(share * rows)) for rows in (manifest.users, manifest.items))
    edges = round(share * sum(manifest.interactions.values()))
    return GraphSize(users, items, min(max(edges, FEWEST * users), users * items // 4), dim=1, image_dim=1)


def write_likeness(out: str, manifest: Manifest, size: GraphSize) -> Dataset:
    """Write a dataset of `size` with the feature sets of `manifest` to the new folder `out`."""
    with redirect_stdout(io.StringIO()):  # the line about what was written
        write_graph(out, size)
    return add_features(out, manifest.features)


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
