"""`distrec prepare`: turn raw files into the prepared dataset that `distrec.data.dataset` describes.

The steps, in order: read (importer), keep ratings of at least `min_rating`, drop duplicates, apply the k-core, split,
number users and items, write. Config and source alone determine the result, down to the bytes. The manifest is written
last, so nobody can mistake the output of an interrupted prepare for a dataset. The same command starts it over.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from distrec.config import Section, apply_overrides, decode, load_file
from distrec.config.bounds import MOST_ROWS, MOST_SEED
from distrec.data import parts, splits
from distrec.data.check import damaged_file
from distrec.data.content import write_content
from distrec.data.dataset import Dataset, Interactions, vector_table, write_part
from distrec.data.filters import Duplicates, k_core, one_of_each_pair
from distrec.data.histories import among_equal_times, equal_times, timeless
from distrec.data.importers import RawDataset, RawFeature, Source, choose_importer
from distrec.data.importers.features import stored_type
from distrec.data.manifest import CONTEXT, FORMAT, SPLITS, UNFINISHED, FeatureEntry, FileEntry, Manifest, write_manifest
from distrec.data.numbering import IdOrder, number
from distrec.data.ordered import distinct
from distrec.data.pictures import LEAST_SIDE, MOST_SIDE
from distrec.data.splits import LEFT_OUT, SplitSection
from distrec.data.storage import Folder, open_folder
from distrec.errors import InputError, first_few

_WRITTEN = ("interactions", "features", "content", "users.parquet", "items.parquet")


class KCore(Section):
    """Fewest interactions per user and per item. Both filters repeat until nothing changes; 0 switches one off."""

    users: int = Field(0, ge=0, le=MOST_ROWS, description="fewest interactions of a user that is kept; 0 keeps all")
    items: int = Field(0, ge=0, le=MOST_ROWS, description="fewest interactions of an item that is kept; 0 keeps all")


class DataConfig(Section):
    """A data config, `configs/data/<dataset>.yaml`."""

    name: str = Field(description="name of the dataset")
    importer: dict[str, Any] = Field(description="reader of the raw data, with its settings")
    min_rating: float | None = Field(
        None, description="lowest rating that counts as a positive; interactions below it are dropped; null keeps all"
    )
    duplicates: Duplicates = Field(
        "first",
        description="which interaction stays where a user and an item have several: first or last in time; refuse: an "
        "error",
    )
    k_core: KCore = Field(KCore(), description="fewest interactions per user and item, applied until nothing changes")
    keep_items: Literal["interacted", "all"] = Field(
        "interacted", description="items to keep: interacted, those with an interaction left; all, the whole catalogue"
    )
    split: SplitSection = Field(description="division of the interactions into train, valid and test")
    id_order: IdOrder = Field(
        "sorted",
        description="numbering of users and items: sorted by original id, first_seen in the source, given by the ids, "
        "or shuffled",
    )
    seed: int = Field(
        1, ge=0, le=MOST_SEED, description="seed of the splits per_user_random and by_user, and of shuffled ids"
    )
    image_side: int | None = Field(
        None,
        le=MOST_SIDE,
        description="shorter side in pixels at which larger images are stored; null stores the files unchanged",
    )

    @field_validator("image_side")
    @classmethod
    def _large_enough(cls, side: int | None) -> int | None:
        if side is not None and side < LEAST_SIDE:
            raise ValueError(f"must be at least {LEAST_SIDE}: the shipped image encoder reads that many pixels a side")
        return side


@dataclass
class _Chosen:
    """The rows and ids that are kept, numbered."""

    interactions: dict[str, Interactions]  # by name: the splits, and the context if there is one
    users: np.ndarray  # [users] codes in index order
    items: np.ndarray  # [items] codes in index order
    dropped: list[str]  # what was dropped and why, in words


def prepare(config: str, source: str, out: str, overrides: Sequence[str] = ()) -> Dataset:
    """Prepare the dataset of a data config and print a summary.

    Args:
        config: Path of a data config.
        source: Folder of the raw files, local or `s3://`.
        out: Folder of the result, local or `s3://`. An unfinished prepare in it is started over. A dataset of the same
            config and source stays unchanged if it is intact and is rebuilt if it is damaged. Any other content is
            refused.
        overrides: Changes to the config, each `dotted.key=value`.

    Raises:
        InputError: the config, the source or `out` is not usable; the message says where and how to fix it.
    """
    settings = decode(DataConfig, apply_overrides(load_file(config), overrides))
    importer, section = choose_importer(settings.importer)
    settings = settings.model_copy(update={"importer": section.model_dump(mode="json")})
    folder = open_folder(out)
    if file := folder.in_the_way():
        raise InputError(f"out '{out}' is not a folder, since '{file}' is a file; give an empty or new folder.")
    with tempfile.TemporaryDirectory(prefix="distrec-") as scratch:
        origin = Source(source, Path(scratch))
        raw = importer.read(origin, section)
        chosen = _choose(raw, settings)
        digest = origin.digest()
        existing = _claim(folder, out, settings, digest)
        if existing is not None:
            print(f"{out} already holds '{settings.name}' of this config and source; nothing to do.")
            return existing
        files: dict[str, FileEntry] = {}
        _write_tables(folder, files, raw, chosen)
        rows = raw.catalogue_row[chosen.items]
        features = {name: _write_feature(folder, files, name, feature, rows) for name, feature in raw.features.items()}
        content, image_bytes = write_content(folder, files, raw, rows, settings.image_side)
        manifest = Manifest(
            format=FORMAT,
            name=settings.name,
            users=len(chosen.users),
            items=len(chosen.items),
            interactions={name: len(rows) for name, rows in chosen.interactions.items()},
            split=settings.split.name,
            id_order=settings.id_order,
            features=features,
            content=content,
            config=settings.model_dump(mode="json"),
            source=digest,
            files=dict(sorted(files.items())),
        )
        write_manifest(folder, manifest)
        folder.remove(UNFINISHED)
    _report(manifest, len(raw.interactions), raw.notes, chosen, image_bytes, out)
    return Dataset.open(out, checked=True)


def _choose(raw: RawDataset, config: DataConfig) -> _Chosen:
    """Filter and split the interactions, and number users and items."""
    source = raw.interactions
    rows = np.arange(len(source))
    dropped: list[str] = []

    def keep(mask: np.ndarray, why: str) -> None:
        nonlocal rows
        if not mask.all():
            dropped.append(f"{len(mask) - int(mask.sum()):,} {why}")
        rows = rows[mask]
        if not len(rows):
            raise InputError(
                f"nothing is left of {len(source):,} interactions after dropping {', '.join(dropped)}; relax the "
                "filters."
            )

    def of(column: np.ndarray | None) -> np.ndarray | None:
        return None if column is None else column[rows]

    if config.min_rating is not None:
        if source.rating is None:
            raise InputError("key 'min_rating' is set but the source has no rating column; map one or remove the key.")
        keep(source.rating >= config.min_rating, f"rated below {config.min_rating:g}")
    first = one_of_each_pair(source.user[rows], source.item[rows], of(source.timestamp), config.duplicates)
    if config.duplicates == "refuse" and not first.all():
        row = rows[~first][0]
        raise InputError(
            f"user {source.user_ids[source.user[row]]} and item {source.item_ids[source.item[row]]} occur together "
            f"more than once (again in {source.where(int(row))}) and 'duplicates' is 'refuse'; remove the row or "
            "choose 'first' or 'last'."
        )
    keep(first, "repeated pairs")
    core = k_core(source.user[rows], source.item[rows], config.k_core.users, config.k_core.items)
    keep(core, f"outside the k-core (users {config.k_core.users}, items {config.k_core.items})")

    label = splits.assign(
        config.split, source.user[rows], source.item[rows], of(source.timestamp), of(source.label), config.seed
    )
    known = label != LEFT_OUT
    keep(known, "valid and test rows of users without train rows")
    label = label[known]
    _check_split(raw, config, source.user[rows], label)

    kept_items = np.arange(len(source.item_ids)) if config.keep_items == "all" else distinct(source.item[rows])
    users = number(
        config.id_order, "user", source.user_ids, distinct(source.user[rows]), source.user[rows],
        np.zeros(len(source.user_ids), np.int64), config.seed,
    )  # fmt: skip
    items = number(
        config.id_order, "item", source.item_ids, kept_items, source.item[rows], raw.catalogue_row, config.seed
    )
    user = _index(users, len(source.user_ids))[source.user[rows]]
    item = _index(items, len(source.item_ids))[source.item[rows]]
    time = np.zeros(len(rows), np.int64) if source.timestamp is None else source.timestamp[rows]
    order = np.lexsort((time, user))
    interactions = {}
    for code, name in _named(label):
        at = order[label[order] == code]
        interactions[name] = Interactions(user[at], item[at], time[at])
    return _Chosen(interactions, users, items, dropped)


def _check_split(raw: RawDataset, config: DataConfig, user: np.ndarray, label: np.ndarray) -> None:
    """Refuse an empty split and, in a given split, a user without a train row."""
    for code, name in enumerate(SPLITS):
        if not (label == code).any():
            remedy = "correct the labels" if config.split.name == "given" else "relax the filters, add interactions"
            raise InputError(
                f"split '{name}' of rule '{config.split.name}' is empty ({len(label):,} interactions in all); {remedy} "
                "or choose another rule."
            )
    lost = splits.users_unknown(user, label)
    if len(lost):
        raise InputError(
            f"user {raw.interactions.user_ids[int(lost[0])]} has no train interaction in the given split ({len(lost)} "
            "such users); give each user one, or remove the user."
        )


def _named(label: np.ndarray) -> list[tuple[int, str]]:
    """Label and name of every set of rows to write: the splits, and the context if there is one."""
    return [*enumerate(SPLITS), *([(splits.CONTEXT, CONTEXT)] if (label == splits.CONTEXT).any() else [])]


def _index(codes: np.ndarray, total: int) -> np.ndarray:
    """The index of each code, `[total]` int32; -1 for a code that was dropped."""
    index = np.full(total, -1, np.int32)
    index[codes] = np.arange(len(codes), dtype=np.int32)
    return index


def _claim(folder: Folder, out: str, config: DataConfig, digest: str) -> Dataset | None:
    """Prepare `folder` for writing, or return the intact dataset that is already in it."""
    try:
        names = folder.names()
        if "manifest.json" in names:
            existing = Dataset.open(out, checked=True)
            _check_same(existing.manifest, out, config, digest)
            damage = existing.defect() or damaged_file(existing)
            if damage is None:
                folder.remove(UNFINISHED)
                return existing
            print(f"{out} is damaged ({damage.what}); preparing it again.")
        elif names and UNFINISHED not in names:
            held = first_few(names, len(names), 1)
            raise InputError(f"out '{out}' holds other files ({held}); give an empty or new folder.")
        folder.write_bytes(b"distrec prepare has started here but not finished; run it again\n", UNFINISHED)
        folder.remove("manifest.json")
        for name in folder.names():
            if name in _WRITTEN or name.endswith(".part"):  # .part: partly written files
                folder.remove(name)
    except InputError:
        raise
    except Exception as error:  # whatever the file system or the object store's client raises
        raise InputError(f"out '{out}' cannot be written ({error}); check the path and its permissions.") from None
    return None


def _check_same(manifest: Manifest, out: str, config: DataConfig, digest: str) -> None:
    wanted = config.model_dump(mode="json")
    for key, value in wanted.items():
        if manifest.config.get(key) != value:
            raise InputError(
                f"out '{out}' holds '{manifest.name}' prepared with another '{key}' ({manifest.config.get(key)!r}); "
                "remove it or give another folder."
            )
    if manifest.source != digest:
        raise InputError(
            f"out '{out}' holds '{manifest.name}' prepared from other source files; remove it or give another folder."
        )


def _write_tables(folder: Folder, files: dict[str, FileEntry], raw: RawDataset, chosen: _Chosen) -> None:
    """Write users, items and interactions; add their entries to `files`."""
    source = raw.interactions

    def ids(all_ids: pa.Array, codes: np.ndarray) -> dict[str, pa.Array]:
        original = all_ids.take(pa.array(codes)).cast(pa.string())
        return {"index": pa.array(np.arange(len(codes), dtype=np.int32)), "original": original}

    items = ids(source.item_ids, chosen.items)
    catalogue = pa.array(raw.catalogue_row[chosen.items])
    items["title"] = pa.nulls(len(catalogue), pa.string()) if raw.titles is None else raw.titles.take(catalogue)
    for file, table in (("users.parquet", ids(source.user_ids, chosen.users)), ("items.parquet", items)):
        files[file] = write_part(folder, file, pa.table(table))
    for name, rows in chosen.interactions.items():
        out = parts.Parts(folder, f"interactions/{name}", parts.ROWS_PER_PART)
        for start in range(0, len(rows), out.rows):
            at = slice(start, start + out.rows)
            out.add(pa.table({"user": rows.user[at], "item": rows.item[at], "timestamp": rows.timestamp[at]}))
        files |= out.close()


def _write_feature(
    folder: Folder, files: dict[str, FileEntry], name: str, feature: RawFeature, rows: np.ndarray
) -> FeatureEntry:
    """Write one feature set in item order; `rows` `[items]` are the items' catalogue rows."""
    dtype = stored_type(feature.values)
    width = feature.values.shape[1]
    out = parts.Parts(folder, f"features/{name}", parts.items_per_part(width * dtype.itemsize))
    for start in range(0, len(rows), out.rows):
        at = rows[start : start + out.rows]
        values = feature.values[at].astype(dtype, copy=False)  # zeros where missing
        out.add(vector_table(start, values, feature.missing[at]))
    files |= out.close()
    return FeatureEntry(
        width=width,
        dtype="float16" if dtype == np.float16 else "float32",
        missing=int(feature.missing[rows].sum()),
        source=feature.source,
        parts=list(out.files),
    )


def _report(
    manifest: Manifest, read: int, notes: list[str], chosen: _Chosen, images: tuple[int, int], out: str
) -> None:
    rows = sum(manifest.interactions.values())
    print(f"{manifest.name}: {manifest.users:,} users, {manifest.items:,} items, {rows:,} interactions")
    print(f"  read      {read:,} rows" + "".join(f"; dropped {text}" for text in chosen.dropped))
    for note in notes:
        print(f"  note      {note}")
    print(f"  split     {manifest.split}: " + ", ".join(f"{k} {v:,}" for k, v in manifest.interactions.items()))
    if not timeless(chosen.interactions) and (tied := among_equal_times(chosen.interactions)):
        print(f"  times     {equal_times(tied, chosen.interactions, manifest.split)}")
    print(f"  ids       {manifest.id_order}")
    for name, feature in manifest.features.items():
        print(
            f"  feature   {name}: {feature.width} x {feature.dtype}, {feature.missing:,} items missing "
            f"({feature.source})"
        )
    for name, items in manifest.content.items():
        size = f", {images[0] / 1e6:,.1f} MB" if name == "image" and items else ""
        if size and images[0] != images[1]:
            size += f" (in the source {images[1] / 1e6:,.1f} MB)"
        print(f"  content   {name}: {items:,} of {manifest.items:,} items{size}")
    print(f"  written   {out} ({sum(f.bytes for f in manifest.files.values()) / 1e6:,.1f} MB)")
