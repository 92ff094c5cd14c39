"""`distrec encode`: turn the raw content of a prepared dataset into one feature set per modality, with frozen encoders.

A feature set has one vector per item, or all token vectors of the encoder's last layer (a token set).

The content is streamed once. Contents that are not in the cache (`distrec.encoders.cache`) are encoded in shards, in
parallel. Then the feature's parts are assembled from the cache, and the manifest is written. A killed run leaves the
dataset unchanged and its finished shards in the cache; the same command continues from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from distrec.config.bounds import (
    MOST_BATCH,
    MOST_CPUS,
    MOST_LAYERS,
    MOST_LENGTH,
    MOST_WIDTH,
    MOST_WORKERS,
    check_option,
)
from distrec.data import parts
from distrec.data.dataset import Dataset, group_rows, vector_table
from distrec.data.manifest import FeatureEntry, FileEntry, write_manifest
from distrec.data.storage import Folder, open_folder
from distrec.encoders.base import MODALITIES, Encoder, Modality, cut_name
from distrec.encoders.cache import Cache, content_hash
from distrec.encoders.pool import Job, Pool, Shard
from distrec.encoders.registry import DEFAULTS, make_encoder
from distrec.errors import InputError, first_few, shown

_BYTES_PER_SHARD = 64 << 20  # of contents
_NAMED = 5  # maximum number of damaged items that are printed


@dataclass
class Counts:
    """How many items of one modality were encoded, and how the others were handled."""

    items: int
    present: int = 0
    encoded: int = 0
    repeated: int = 0  # same content as an earlier item
    cached: int = 0
    damaged: list[int] = field(default_factory=list)  # items whose content could not be encoded


def encode(
    data: str,
    text: str | None = None,
    image: str | None = None,
    max_tokens: int | None = None,
    workers: int = 2,
    threads: int = 1,
    batch: int | None = None,
    shard: int = 256,
    cache: str | None = None,
    tokens: bool = False,
    text_tokens: int | None = None,
    image_pool: int | None = None,
    cut: int | None = None,
) -> dict[str, Counts]:
    """Encode the raw content of the prepared dataset `data` into its feature sets `text` and `image`.

    With `tokens`, the sets are `text-tokens` and `image-tokens` instead; with `cut` N, `text-tokens-cutN` and
    `image-tokens-cutN`.

    Args:
        data: A prepared dataset, local or `s3://`.
        text: Text encoder: `all-minilm-l6-v2` or the folder of a `transformers` model. None: the default encoder, if
            the dataset has texts. `none`: do not encode texts.
        image: Image encoder, likewise; the default is `efficientnet-lite0`.
        max_tokens: Maximum tokens of a text that becomes one vector; longer texts are truncated. None: 128.
        workers: Number of Ray actors; 0 encodes in this process.
        threads: CPU threads, and CPUs of the cluster, per worker.
        batch: Items per forward pass; None: the encoder's default.
        shard: Contents that are encoded and cached together; fewer if they or their vectors take more than 64 MiB. A
            killed worker loses at most its current shard.
        cache: Cache folder, local or `s3://`; None: `encoded` inside the dataset. A folder outside the dataset can
            serve several datasets.
        tokens: Keep the vectors of all tokens, neither averaged nor scaled. The tokens of a text are its word pieces,
            including special ones. Those of an image are a class token and patches, or the mean and the cells of the
            feature map.
        text_tokens: With `tokens`, maximum tokens of a text; None: 30.
        image_pool: With `tokens`, average feature maps down to this many cells per side; None: do not.
        cut: With `tokens`, keep the hidden states before this many last layers, for a method that trains these layers.
            A feature map is then kept whole; it is averaged down after the layers.

    Returns:
        Counts of the items, by feature name.

    Raises:
        InputError: there is no content, an encoder is unknown, the feature set was imported, an option is out of range,
            or the cluster has too few CPUs.
    """
    for name, value, least, most in (
        ("workers", workers, 0, MOST_WORKERS),
        ("threads", threads, 1, MOST_CPUS),
        ("shard", shard, 1, MOST_BATCH),
        ("batch", batch, 1, MOST_BATCH),
        ("max-tokens", max_tokens, 2, MOST_LENGTH),  # a text has a token at its start and one at its end
        ("text-tokens", text_tokens, 2, MOST_LENGTH),
        ("image-pool", image_pool, 2, MOST_WIDTH),
        ("cut", cut, 1, MOST_LAYERS),
    ):
        if name in ("text-tokens", "image-pool", "cut") and value is not None and not tokens:
            raise InputError(
                f"option '--{name}' is {shown(value)} but --tokens is not given; add it, or leave --{name} out."
            )
        check_option(name, value, least, most)
    if tokens and max_tokens is not None:
        raise InputError(
            f"option '--max-tokens' is {max_tokens} but --tokens keeps the tokens of a text, whose number is "
            "--text-tokens; use that."
        )
    dataset = Dataset.open(data, checked=True)
    options: dict[str, Any] = {"max_tokens": max_tokens or 128}
    if tokens:
        options = {"max_tokens": text_tokens or 30, "pooled": False, "image_pool": image_pool, "cut": cut or 0}
    names = {modality: cut_name(modality, cut or 0) if tokens else modality for modality in MODALITIES}
    encoders = _choose(dataset, {"text": text, "image": image}, names, options)
    if defect := dataset.defect(encoded=False):  # this command writes encoded features again, damaged or not
        raise dataset.error(defect)
    for name, encoder in encoders.items():
        if encoder.tokens > 1:
            size = dataset.manifest.content[encoder.modality] * encoder.row_bytes
            print(
                f"{name}: {encoder.tokens} tokens x {encoder.width} for {dataset.items:,} items, up to "
                f"{size / 1e6:,.0f} MB and as much again in the cache"
            )
    kept = open_folder(cache) if cache is not None else dataset.folder.folder("encoded")
    report = {}
    with Pool(workers, threads) as pool:
        for name, encoder in encoders.items():
            folder = kept.folder(encoder.key)
            try:
                folder.write_json({"encoder": encoder.name, **encoder.settings}, "encoder.json")
            except OSError as error:
                raise InputError(f"cache '{folder}' cannot be written ({error}); check its permissions.") from None
            known = Cache(folder, encoder.tokens, encoder.width)
            together = max(1, min(shard, parts.BYTES_PER_PART // encoder.row_bytes))
            hashes, counts = _encode_missing(dataset, pool, Job(encoder, str(folder), batch), known, together)
            dataset = _write_feature(dataset, name, encoder, known, hashes, counts)
            _print(dataset, name, encoder, counts)
            report[name] = counts
    return report


def _choose(
    dataset: Dataset, asked: dict[Modality, str | None], names: dict[Modality, str], options: dict[str, Any]
) -> dict[str, Encoder]:
    """Choose the encoder of each feature set to write; `names` are the sets' names, `options` go to `make_encoder`."""
    chosen: dict[str, Encoder] = {}
    for modality in MODALITIES:
        name, there = asked[modality], dataset.manifest.content.get(modality, 0)
        if name == "none" or (name is None and not there):
            continue
        if not there:
            raise InputError(
                f"data '{dataset.folder}' has no {modality} to encode with '{name}'; prepare it with {modality}s, or "
                f"leave out --{modality}."
            )
        feature = names[modality]
        entry = dataset.manifest.features.get(feature)
        if entry is not None and not entry.encoded:
            raise InputError(
                f"data '{dataset.folder}' has an imported feature '{feature}' (from {entry.source}) that encode would "
                f"replace; give it another name in the data config, or pass --{modality} none."
            )
        chosen[feature] = make_encoder(modality, name or DEFAULTS[modality], **options)
    if not chosen:
        raise InputError(
            f"data '{dataset.folder}' has no text or image left to encode; prepare it with importer.items.text or "
            "images."
        )
    return chosen


def _encode_missing(
    dataset: Dataset, pool: Pool, job: Job, cache: Cache, shard: int
) -> tuple[list[bytes | None], Counts]:
    """Encode the contents that are not in the cache.

    Returns:
        Each item's content hash, None without content, and the counts.
    """
    modality = job.encoder.modality
    counts = Counts(items=dataset.items)
    hashes: list[bytes | None] = []
    pending: set[bytes] = set()
    bar = tqdm(total=dataset.manifest.content[modality], desc=modality, unit="item", smoothing=0.1)

    def shards() -> Iterator[Shard]:
        now, held = Shard([], []), 0
        for rows in dataset.content([modality]):
            for content in rows[modality].to_pylist():
                blank = content is None or (modality == "text" and not content.strip())
                key = None if blank else content_hash(content)
                hashes.append(key)
                if key is None:
                    continue
                counts.present += 1
                if key in pending:
                    counts.repeated += 1
                    bar.update()
                elif key in cache:
                    counts.cached += 1
                    bar.update()
                else:
                    pending.add(key)
                    now.hashes.append(key)
                    now.contents.append(content)
                    held += len(content)
                    if len(now.hashes) == shard or held >= _BYTES_PER_SHARD:
                        yield now
                        now, held = Shard([], []), 0
        if now.hashes:
            yield now

    with bar:
        for part, rows in pool.run(job, shards()):
            cache.add(part)
            counts.encoded += rows
            bar.update(rows)
    return hashes, counts


def _write_feature(
    dataset: Dataset,
    name: str,
    encoder: Encoder,
    cache: Cache,
    hashes: list[bytes | None],
    counts: Counts,
) -> Dataset:
    """Write the feature's parts from the cache, then the manifest; then remove the parts it no longer lists.

    A part's name contains the start of its checksum, so no part is ever overwritten. The manifest on disk, old or new,
    therefore always matches the files.
    """
    old, step, several = dataset.manifest, parts.items_per_part(encoder.row_bytes), encoder.tokens > 1
    group = group_rows(encoder.row_bytes) if several else step
    # Token values hardly repeat. Without a dictionary, parts are smaller, written in half the time and read in a third.
    out = parts.Parts(
        dataset.folder, f"features/{name}", step, group_rows=group, dictionary=not several, known=old.files
    )
    lacking = 0
    for start in range(0, dataset.items, step):
        values, missing, count = cache.rows(hashes[start : start + step])
        lacking += int(missing.sum())
        counts.damaged += [start + at for at in missing.nonzero()[0].tolist() if hashes[start + at] is not None]
        out.add(vector_table(start, values, missing, count))
    files = out.close()
    entry = FeatureEntry(
        tokens=encoder.tokens, width=encoder.width, dtype="float16", missing=lacking,
        source=encoder.source, parts=list(files),
    )  # fmt: skip
    others = {file: value for file, value in old.files.items() if not file.startswith(f"features/{name}/")}
    manifest = old.model_copy(
        update={
            "features": {**old.features, name: entry},
            "files": dict(sorted({**others, **files}.items())),
        }
    )
    if manifest != old:
        write_manifest(dataset.folder, manifest)
    _remove_others(dataset.folder, name, files)
    return Dataset(dataset.folder, manifest)


def _remove_others(folder: Folder, name: str, files: dict[str, FileEntry]) -> None:
    for found in folder.names("features", name):
        if f"features/{name}/{found}" not in files:
            folder.remove("features", name, found)


def _print(dataset: Dataset, name: str, encoder: Encoder, counts: Counts) -> None:
    lacking, modality = counts.items - counts.present, encoder.modality
    each = f"{encoder.width} wide" if encoder.tokens == 1 else f"{encoder.tokens} tokens, {encoder.width} wide"
    print(
        f"{name}: {counts.items:,} items encoded by {encoder.name} ({each}); {counts.encoded:,} encoded, "
        f"{counts.cached:,} from the cache, {counts.repeated:,} repeated, {lacking:,} without {modality}, "
        f"{len(counts.damaged):,} damaged"
    )
    if counts.damaged:
        named, ids = counts.damaged[:_NAMED], dataset.items_table()["original"]
        content = {row["item"]: row[modality] for row in dataset.content_of(named, [modality])}
        told = [f"{ids[item]} ({encoder.defect(content[item])})" for item in named]
        print(f"  damaged {modality}, marked missing: items {first_few(told, len(counts.damaged), _NAMED)}")
