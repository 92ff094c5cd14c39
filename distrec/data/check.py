"""`distrec check`: verify that a prepared dataset matches its manifest and is fit to train on."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distrec.data.dataset import Dataset, Interactions
from distrec.data.histories import among_equal_times, backward, equal_times, timeless
from distrec.data.manifest import COLD, CONTEXT, SPLITS
from distrec.data.opening import Defect, in_threads
from distrec.data.ordered import contains, distinct
from distrec.errors import InputError

_AGAIN = "run 'distrec prepare' again"
_THREADS = 4  # files whose checksums are computed at once
_LOW = 0.5  # a modality is reported in a warning when less than this share of the items has it


def check(path: str) -> None:
    """Verify the prepared dataset at `path` and print a summary of it, with warnings for valid but unusual content.

    Checks manifest and footers, as opening a dataset always does, each file's SHA-256, the ids and their ranges,
    repeated pairs within and across splits, users without train rows, and NaN or infinite features. Holds all
    interactions (16 bytes each), a number of 8 bytes for each, and one row group of features in memory.

    Raises:
        InputError: names the first defect found.
    """
    dataset = Dataset.open(path)
    manifest = dataset.manifest
    damage = damaged_file(dataset)
    if damage is not None:
        raise dataset.error(damage)
    size = sum(entry.bytes for entry in manifest.files.values())
    print(f"{manifest.name}: {manifest.users:,} users, {manifest.items:,} items")
    print(f"  files         {len(manifest.files)} with {size / 1e6:,.1f} MB, checksums match")
    warnings: list[str] = []
    _check_ids(dataset, "users", dataset.users_table())
    _check_ids(dataset, "items", dataset.items_table())
    _check_interactions(dataset, warnings)
    for name in manifest.features:
        _check_feature(dataset, name, warnings)
    _check_content(dataset, warnings)
    for warning in warnings:
        print(f"  warning       {warning}")
    print("  no defect found")


def damaged_file(dataset: Dataset, names: Iterable[str] | None = None) -> Defect | None:
    """The first of the files `names` (default: all) that is missing or does not match its SHA-256, or None."""
    for _, defect in in_threads(
        partial(_damage, dataset), dataset.manifest.files if names is None else names, _THREADS
    ):
        if defect is not None:
            return defect
    return None


def _damage(dataset: Dataset, name: str) -> Defect | None:
    entry = dataset.manifest.files[name]
    try:
        found = dataset.folder.sha256(*name.split("/"))
    except FileNotFoundError:
        return Defect(name, f"'{name}' is listed in manifest.json but missing")
    if found == entry.sha256:
        return None
    return Defect(name, f"checksum of '{name}' differs from manifest.json (expected {entry.bytes} bytes)")


def _check_ids(dataset: Dataset, what: str, table: pa.Table) -> None:
    found, count = pc.count_distinct(table["original"]).as_py(), table.num_rows
    if found != count:
        raise InputError(
            f"data '{dataset.folder}': '{what}.parquet' has {found} distinct ids for {count} {what}; {_AGAIN}."
        )


def _check_interactions(dataset: Dataset, warnings: list[str]) -> None:
    pairs: dict[str, np.ndarray] = {}
    splits: dict[str, Interactions] = {}
    known = np.zeros(dataset.users, bool)
    rows = np.zeros(dataset.items, np.int64)
    context = [CONTEXT] if CONTEXT in dataset.manifest.interactions else []
    for split in ("train", *context, *SPLITS[1:]):
        found = dataset.interactions(split)
        if not len(found):
            raise InputError(
                f"data '{dataset.folder}': split '{split}' has 0 rows, and no split may be empty; {_AGAIN}."
            )
        pair = np.sort(found.user.astype(np.int64) * dataset.items + found.item)
        same = pair[1:][pair[1:] == pair[:-1]]
        if len(same):
            raise InputError(f"data '{dataset.folder}': {_pair(dataset, same[0])} occurs twice in '{split}'; {_AGAIN}.")
        for other, earlier in pairs.items():
            both = pair[contains(earlier, pair)]
            if len(both):
                raise InputError(
                    f"data '{dataset.folder}': {_pair(dataset, both[0])} is in '{other}' and in '{split}' ({len(both)} "
                    f"such pairs leak); {_AGAIN}."
                )
        pairs[split], splits[split] = pair, found
        if split in ("train", CONTEXT):
            known[found.user] = True
        elif not known[found.user].all():
            user = int(found.user[~known[found.user]][0])
            raise InputError(f"data '{dataset.folder}': user {user} is in '{split}' but not in train; {_AGAIN}.")
        if split == "train":
            rows = np.bincount(found.item, minlength=dataset.items)
    total = sum(len(pair) for pair in pairs.values())
    counts = ", ".join(f"{split} {len(pair):,}" for split, pair in pairs.items())
    print(
        f"  interactions  {counts}; {total / dataset.users:.1f} per user, density "
        f"{total / dataset.users / dataset.items:.3%}"
    )
    every = "every user has train or context rows" if context else "every user has train rows"
    print(f"  split         {dataset.manifest.split}; no repeated pairs, {every}")
    pairs.clear()  # for the moments of `among_equal_times`, which are as many numbers
    _tell_times(dataset, splits, warnings)
    print(
        f"  cold items    {int((rows <= COLD).sum()):,} with at most {COLD} train rows, of which "
        f"{int((rows == 0).sum()):,} have none"
    )
    if not known.all():
        warnings.append(f"{int((~known).sum()):,} users have no interactions at all")


def _tell_times(dataset: Dataset, splits: dict[str, Interactions], warnings: list[str]) -> None:
    """Print whether the splits are in time order, and how many held-out rows were chosen among equal times."""
    order = backward(splits, dataset.users)
    print(
        f"  time order    {order.older:,} of {order.held_out:,} held-out rows are older than the newest known row of "
        "their user"
    )
    print(f"  equal times   {equal_times(among_equal_times(splits), splits, dataset.manifest.split)}")
    if timeless(splits):
        warnings.append("all rows have the same time, so histories are in the order of the source within each split")


def _pair(dataset: Dataset, pair: np.int64) -> str:
    return f"user {pair // dataset.items} with item {pair % dataset.items}"


def _check_feature(dataset: Dataset, name: str, warnings: list[str]) -> None:
    entry = dataset.manifest.features[name]
    fingerprints = []  # by row group, one 64-bit number per item that has the feature
    missing_rows = real = 0
    for rows in dataset.feature_groups(name, 0, dataset.items):
        fingerprints.append(_fingerprints(rows.values[~rows.missing]))
        missing_rows += int(rows.missing.sum())
        real += int(rows.count.sum())
    if missing_rows != entry.missing:
        raise InputError(
            f"data '{dataset.folder}': feature '{name}' has {missing_rows} missing items but manifest.json says "
            f"{entry.missing}; {entry.remedy(name, dataset.folder)}."
        )
    seen = np.concatenate(fingerprints)
    shape = f"{entry.width} x {entry.dtype}"
    if entry.tokens > 1:
        shape = f"{entry.tokens} tokens x {shape}, {real / max(len(seen), 1):.1f} of them real on average"
    print(f"  feature       {name}: {shape}, {_share(len(seen), dataset.items)}, from {entry.source}")
    repeated = len(seen) - len(distinct(seen))
    if repeated:
        warnings.append(f"feature '{name}': {repeated:,} items have the same vector as an earlier item")
    _warn_low(f"feature '{name}'", len(seen), dataset.items, warnings)


def _fingerprints(values: np.ndarray) -> np.ndarray:
    """One 64-bit number per row, `[rows]`; two different rows get the same one with a probability of about 2**-48."""
    words = values.view(np.uint16 if values.dtype == np.float16 else np.uint32)
    weights = np.random.Generator(np.random.PCG64(1)).integers(0, 2**64, values.shape[1], np.uint64) | np.uint64(1)
    total = np.zeros(len(values), np.uint64)
    step = max(1, (1 << 20) // max(len(values), 1))  # columns at a time: 8 MiB of 64-bit words
    for start in range(0, values.shape[1], step):
        total += words[:, start : start + step].astype(np.uint64) @ weights[start : start + step]
    return total


def _check_content(dataset: Dataset, warnings: list[str]) -> None:
    if not dataset.manifest.content:
        return
    found = {"text": 0, "image": 0}
    for rows in dataset.content(["text", "image"]):
        for kind in found:
            found[kind] += len(rows) - rows[kind].null_count
    if found != dataset.manifest.content:
        raise InputError(
            f"data '{dataset.folder}': content has {found} but manifest.json says {dataset.manifest.content}; {_AGAIN}."
        )
    for kind, items in found.items():
        print(f"  content       {kind}: {_share(items, dataset.items)}")
        _warn_low(f"content '{kind}'", items, dataset.items, warnings)


def _share(items: int, of: int) -> str:
    return f"{items:,} of {of:,} items ({items / of:.1%})"


def _warn_low(what: str, items: int, of: int, warnings: list[str]) -> None:
    if 0 < items < _LOW * of:
        warnings.append(f"{what}: only {_share(items, of)} have it")
