"""`distrec check`: verify that a prepared dataset matches its manifest and is fit to train on."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distrec.data.dataset import COLD, CONTEXT, SPLITS, Dataset, Interactions, vectors
from distrec.data.histories import backward, equal_times, timeless
from distrec.data.importers.source import file_sha256
from distrec.data.ordered import contains, distinct
from distrec.data.storage import open_parquet
from distrec.errors import InputError

_AGAIN = "run 'distrec prepare' again"
_INTERACTIONS = {"user": pa.int32(), "item": pa.int32(), "timestamp": pa.int64()}
_USERS = {"index": pa.int32(), "original": pa.string()}
_ITEMS = {**_USERS, "title": pa.string()}
_CONTENT = {"item": pa.int32(), "text": pa.string(), "image": pa.binary()}
_LOW = 0.5  # a modality is reported in a warning when less than this share of the items has it


def check(path: str) -> None:
    """Verify the prepared dataset at `path` and print a summary of it, with warnings for valid but unusual content.

    Checks each file's SHA-256 and schema, the ids and their ranges, repeated pairs within and across splits, users
    without train rows, and NaN or infinite features. Holds all user-item pairs and one row group of features in memory.

    Raises:
        InputError: names the first defect found.
    """
    dataset = Dataset.open(path)
    manifest = dataset.manifest
    damage = damaged_file(dataset)
    if damage is not None:
        raise InputError(f"data '{path}': {damage}; {_AGAIN}.")
    size = sum(entry.bytes for entry in manifest.files.values())
    print(f"{manifest.name}: {manifest.users:,} users, {manifest.items:,} items")
    print(f"  files         {len(manifest.files)} with {size / 1e6:,.1f} MB, checksums match")
    warnings: list[str] = []
    for name, count in (("users", manifest.users), ("items", manifest.items)):
        _check_ids(dataset, name, count)
    _check_interactions(dataset, warnings)
    for name in manifest.features:
        _check_feature(dataset, name, warnings)
    _check_content(dataset, warnings)
    for warning in warnings:
        print(f"  warning       {warning}")
    print("  no defect found")


def damaged_file(dataset: Dataset, names: Iterable[str] | None = None) -> str | None:
    """Describe the first of the files `names` (default: all) that is missing or does not match its SHA-256.

    Returns:
        A phrase for a message, or None if all of them are intact.
    """
    for name in dataset.manifest.files if names is None else names:
        entry = dataset.manifest.files[name]
        if not dataset.folder.exists(name):
            return f"'{name}' is listed in manifest.json but missing"
        if file_sha256(dataset.folder, name) != entry.sha256:
            return f"checksum of '{name}' differs from manifest.json (expected {entry.bytes} bytes)"
    return None


def _parts(dataset: Dataset, prefix: str) -> list[str]:
    return sorted(name for name in dataset.manifest.files if name.startswith(prefix))


def _check_schema(dataset: Dataset, name: str, expected: dict[str, pa.DataType]) -> None:
    """Refuse a file that the manifest does not list, or that has other columns, types or numbers of rows."""
    if name not in dataset.manifest.files:
        raise InputError(f"data '{dataset.folder}': manifest.json does not list '{name}'; {_AGAIN}.")
    file = open_parquet(dataset.folder, name)
    found = {field.name: field.type for field in file.schema_arrow}
    for column, kind in expected.items():
        if found.get(column) != kind:
            raise InputError(
                f"data '{dataset.folder}': '{name}' column '{column}' is {found.get(column, 'absent')}, must be "
                f"{kind}; {_AGAIN}."
            )
    rows = dataset.manifest.files[name].rows
    if file.metadata.num_rows != rows:
        raise InputError(
            f"data '{dataset.folder}': '{name}' has {file.metadata.num_rows} rows but manifest.json says {rows}; "
            f"{_AGAIN}."
        )


def _check_ids(dataset: Dataset, what: str, count: int) -> None:
    name = f"{what}.parquet"
    _check_schema(dataset, name, _ITEMS if what == "items" else _USERS)
    table = dataset.read_table(name, verify=False)
    if not np.array_equal(table["index"].to_numpy(), np.arange(count)):
        raise InputError(f"data '{dataset.folder}': '{name}' index is not 0 to {count - 1}; {_AGAIN}.")
    distinct = pc.count_distinct(table["original"]).as_py()
    if distinct != count or table["original"].null_count:
        raise InputError(f"data '{dataset.folder}': '{name}' has {distinct} distinct ids for {count} {what}; {_AGAIN}.")


def _check_interactions(dataset: Dataset, warnings: list[str]) -> None:
    pairs: dict[str, np.ndarray] = {}
    splits: dict[str, Interactions] = {}
    known = np.zeros(dataset.users, bool)
    rows = np.zeros(dataset.items, np.int64)
    context = [CONTEXT] if CONTEXT in dataset.manifest.interactions else []
    for split in ("train", *context, *SPLITS[1:]):
        for name in _parts(dataset, f"interactions/{split}/"):
            _check_schema(dataset, name, _INTERACTIONS)
        found = dataset.interactions(split)
        if len(found) != dataset.manifest.interactions.get(split) or not len(found):
            raise InputError(
                f"data '{dataset.folder}': split '{split}' has {len(found)} rows but manifest.json says "
                f"{dataset.manifest.interactions.get(split)}, and no split may be empty; {_AGAIN}."
            )
        back = (np.diff(found.user) < 0) | ((np.diff(found.user) == 0) & (np.diff(found.timestamp) < 0))
        if back.any():
            row = int(np.flatnonzero(back)[0]) + 1
            raise InputError(f"data '{dataset.folder}': {split} row {row} is out of order (user, then time); {_AGAIN}.")
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
    print(f"  equal times   {equal_times(splits, dataset.manifest.split)}")
    if timeless(splits):
        warnings.append("all rows have the same time, so histories are in the order of the source within each split")


def _pair(dataset: Dataset, pair: np.int64) -> str:
    return f"user {pair // dataset.items} with item {pair % dataset.items}"


def _check_feature(dataset: Dataset, name: str, warnings: list[str]) -> None:
    entry = dataset.manifest.features[name]
    value_type = pa.float16() if entry.dtype == "float16" else pa.float32()
    length = entry.tokens * entry.width
    expected = {"item": pa.int32(), "vector": pa.list_(value_type, length), "missing": pa.bool_()}
    if entry.tokens > 1:
        expected["count"] = pa.int32()
    fingerprints = []  # by row group, one 64-bit number per item that has the feature
    at = missing_rows = real = 0
    for part in entry.parts:
        _check_schema(dataset, part, expected)
        file = open_parquet(dataset.folder, part)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            values, missing = vectors(table["vector"], length), table["missing"].to_numpy()
            where = f"data '{dataset.folder}': '{part}'"
            if not np.array_equal(table["item"].to_numpy(), np.arange(at, at + len(values))):
                raise InputError(f"{where} does not hold items {at} to {at + len(values) - 1} in order; {_AGAIN}.")
            if not np.isfinite(values).all():
                row, column = np.argwhere(~np.isfinite(values))[0]
                raise InputError(
                    f"{where} item {at + row}: feature {column} is {values[row, column]}; correct the source."
                )
            if entry.tokens > 1:
                count = table["count"].to_numpy()
                wrong = (count < 0) | (count > entry.tokens) | ((count == 0) != missing)
                if wrong.any():
                    row = int(np.flatnonzero(wrong)[0])
                    raise InputError(
                        f"{where} item {at + row}: {count[row]} of {entry.tokens} tokens are real but 'missing' is "
                        f"{bool(missing[row])}; run 'distrec encode --tokens' again."
                    )
                real += int(count.sum())
            fingerprints.append(_fingerprints(values[~missing]))
            at += len(values)
            missing_rows += int(missing.sum())
    if at != dataset.items or missing_rows != entry.missing:
        raise InputError(
            f"data '{dataset.folder}': feature '{name}' has {at} rows ({missing_rows} missing) but manifest.json says "
            f"{dataset.items} ({entry.missing} missing); {_AGAIN}."
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
    parts = _parts(dataset, "content/")
    if not parts:
        return
    found = {"text": 0, "image": 0}
    at = 0
    for part in parts:
        _check_schema(dataset, part, _CONTENT)
    for batch in dataset.content(["text", "image"]):
        if not np.array_equal(batch["item"].to_numpy(), np.arange(at, at + len(batch))):
            raise InputError(f"data '{dataset.folder}': content is not in item order near item {at}; {_AGAIN}.")
        at += len(batch)
        for kind in found:
            found[kind] += len(batch) - batch[kind].null_count
    if at != dataset.items or found != dataset.manifest.content:
        raise InputError(
            f"data '{dataset.folder}': content has {at} rows with {found} but manifest.json says {dataset.items} with "
            f"{dataset.manifest.content}; {_AGAIN}."
        )
    for kind, items in found.items():
        print(f"  content       {kind}: {_share(items, dataset.items)}")
        _warn_low(f"content '{kind}'", items, dataset.items, warnings)


def _share(items: int, of: int) -> str:
    return f"{items:,} of {of:,} items ({items / of:.1%})"


def _warn_low(what: str, items: int, of: int, warnings: list[str]) -> None:
    if 0 < items < _LOW * of:
        warnings.append(f"{what}: only {_share(items, of)} have it")
