from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distrec.data.check import check
from distrec.data.dataset import Dataset
from distrec.data.manifest import FeatureEntry, write_manifest
from distrec.encoders.encode import encode
from distrec.encoders.registry import make_encoder
from distrec.errors import InputError
from tests.encoders import tiny


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.text_model(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.vit_model(tmp_path_factory.mktemp("models") / "vit")


def parts(data: str | Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of every finished part of the cache, by name."""
    found = Path(data).glob("encoded/*/part-*.parquet")
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


@pytest.mark.parametrize(("count", "shard"), [(3, 256), (40, 7), (41, 1)])
def test_features_are_the_encoders_vectors_in_item_order(
    tmp_path: Path, bert: str, vit: str, count: int, shard: int
) -> None:
    texts, images = tiny.texts(count), [tiny.jpeg(seed) for seed in range(count)]
    data = tiny.write_dataset(str(tmp_path / "data"), texts, images)
    encode(data, text=bert, image=vit, workers=0, shard=shard)
    for name, folder, contents in (("text", bert, texts), ("image", vit, images)):
        values, missing = tiny.rows(data, name)
        assert not missing.any()
        np.testing.assert_allclose(values, make_encoder(name, folder).encode(contents, 1), atol=2e-3, rtol=1e-3)  # type: ignore[arg-type]
        assert Dataset.open(data).feature(name).dtype == "float16"
    check(data)


def test_damaged_and_absent_content_is_marked_missing_and_reported(
    tmp_path: Path, vit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    images: list[bytes | None] = [tiny.jpeg(seed) for seed in range(12)]
    whole = images[0] or b""
    images[2], images[5], images[7], images[9] = None, b"not an image", whole[: len(whole) // 2], b""
    data = tiny.write_dataset(str(tmp_path / "data"), None, images)
    counts = encode(data, image=vit, workers=0)["image"]
    values, missing = tiny.rows(data, "image")
    assert np.flatnonzero(missing).tolist() == [2, 5, 7, 9]
    assert not values[missing].any()
    assert counts.damaged == [5, 7, 9]
    printed = capsys.readouterr()
    assert "1 without image, 3 damaged" in printed.out
    named = "sku-5 (no known image format, begins with b'not an image'), sku-7 (cannot be decoded: Truncated File Read)"
    assert f"  damaged image, marked missing: items {named}, sku-9 (an empty file)\n" in printed.out
    again = encode(data, image=vit, workers=0)["image"]
    assert (again.encoded, again.damaged) == (0, [5, 7, 9])
    check(data)


def test_a_shard_ends_when_its_contents_are_large(tmp_path: Path, vit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [tiny.jpeg(seed) for seed in range(9)]
    data = tiny.write_dataset(str(tmp_path / "data"), None, images)
    monkeypatch.setattr("distrec.encoders.encode._BYTES_PER_SHARD", 3 * max(map(len, images)))
    encode(data, image=vit, workers=0)
    assert 2 <= len(parts(data)) <= 4
    assert not tiny.rows(data, "image")[1].any()


def test_a_vector_beyond_float16_is_named(
    tmp_path: Path, vit: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny.write_dataset(str(tmp_path / "data"), None, [tiny.jpeg(seed) for seed in range(7)])
    huge = lambda self, contents, batch: np.full((len(contents), self.width), 1e9, np.float32)  # noqa: E731
    monkeypatch.setattr("distrec.encoders.base.Encoder.encode", huge)
    encode(data, image=vit, workers=0)
    reason = "(its vector exceeds the range of float16)"
    assert (
        f"sku-0 {reason}, sku-1 {reason}, sku-2 {reason}, sku-3 {reason}, sku-4 {reason}, …" in capsys.readouterr().out
    )


def test_blank_texts_are_missing(tmp_path: Path, bert: str) -> None:
    texts = [*tiny.texts(3), None, "", " \n"]
    data = tiny.write_dataset(str(tmp_path / "data"), texts)
    encode(data, text=bert, workers=0)
    assert tiny.rows(data, "text")[1].tolist() == [False] * 3 + [True] * 3


def test_nothing_present_still_gives_a_feature_of_missing_rows(tmp_path: Path, vit: str) -> None:
    data = tiny.write_dataset(str(tmp_path / "data"), None, [b"x", b"y", b"z"])
    assert encode(data, image=vit, workers=0)["image"].damaged == [0, 1, 2]
    assert tiny.rows(data, "image")[1].all()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:50])])
def test_the_same_command_again_repairs_damaged_vectors(tmp_path: Path, bert: str, damage: Any) -> None:
    data = tiny.write_dataset(str(tmp_path / "data"), tiny.texts(4))
    encode(data, text=bert, workers=0)
    before, identity = tiny.rows(data, "text")[0], Dataset.open(data).hash
    (part,) = Path(data).glob("features/text/part-*")
    damage(part)
    with pytest.raises(InputError, match=rf"run 'distrec encode {data} --text {bert} --image none' again\.$"):
        Dataset.open(data)
    encode(data, text=bert, workers=0)
    assert np.array_equal(tiny.rows(data, "text")[0], before)
    assert Dataset.open(data).hash == identity


def test_equal_contents_are_encoded_once(tmp_path: Path, bert: str) -> None:
    texts = (tiny.texts(10) * 4)[:35]
    data = tiny.write_dataset(str(tmp_path / "data"), texts)
    counts = encode(data, text=bert, workers=0, shard=3)["text"]
    assert (counts.encoded, counts.repeated, counts.cached) == (10, 25, 0)
    values, _ = tiny.rows(data, "text")
    assert np.array_equal(values, np.tile(values[:10], (4, 1))[:35])
    assert len(np.unique(values[:10], axis=0)) == 10


def test_the_same_command_again_does_nothing(tmp_path: Path, bert: str) -> None:
    data = tiny.write_dataset(str(tmp_path / "data"), tiny.texts(20))
    encode(data, text=bert, workers=0, shard=6)
    before = {path: path.stat().st_mtime_ns for path in Path(data).rglob("part-*")}
    identity = Dataset.open(data).hash
    counts = encode(data, text=bert, workers=0, shard=6)["text"]
    assert (counts.encoded, counts.cached) == (0, 20)
    assert {path: path.stat().st_mtime_ns for path in Path(data).rglob("part-*")} == before
    assert Dataset.open(data).hash == identity


def test_a_changed_item_alone_is_encoded_again_across_prepares(tmp_path: Path, bert: str) -> None:
    texts, cache = tiny.texts(30), str(tmp_path / "cache")
    first = tiny.write_dataset(str(tmp_path / "first"), texts)
    encode(first, text=bert, workers=0, shard=8, cache=cache)
    changed = list(reversed(texts))
    changed[4] = "something new"
    second = tiny.write_dataset(str(tmp_path / "second"), changed)
    counts = encode(second, text=bert, workers=0, shard=8, cache=cache)["text"]
    assert (counts.encoded, counts.cached) == (1, 29)
    alone = tiny.write_dataset(str(tmp_path / "alone"), changed)
    encode(alone, text=bert, workers=0)
    np.testing.assert_allclose(tiny.rows(second, "text")[0], tiny.rows(alone, "text")[0], atol=2e-3)


def test_another_encoder_replaces_the_feature_and_leaves_no_old_part(tmp_path: Path, bert: str) -> None:
    data = tiny.write_dataset(str(tmp_path / "data"), tiny.texts(9))
    encode(data, text=bert, workers=0)
    old = Dataset.open(data)
    encode(data, text=bert, max_tokens=4, workers=0)
    new = Dataset.open(data)
    assert new.hash != old.hash
    assert new.feature("text").source != old.feature("text").source
    there = {path.name for path in Path(data, "features/text").iterdir()}
    assert there == {Path(part).name for part in new.feature("text").parts}
    check(data)


@pytest.mark.parametrize("tokens", [False, True])
def test_a_killed_run_leaves_the_dataset_as_it_was_and_is_continued(tmp_path: Path, tokens: bool) -> None:
    name = "text-tokens" if tokens else "text"
    texts = tiny.texts(240, longest=50)
    data = tiny.write_dataset(str(tmp_path / "data"), texts)
    identity = Dataset.open(data).hash
    call = f"encode(sys.argv[1], workers=0, shard=10, tokens={tokens})"
    code = f"import sys; from distrec.encoders.encode import encode; {call}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code, data], env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while len(parts(data)) < 3 and time.monotonic() < deadline:
            assert process.poll() is None, "the run ended before it was killed"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    finished = parts(data)
    assert 3 <= len(finished) < 24
    assert Dataset.open(data).hash == identity

    counts = encode(data, workers=0, shard=10, tokens=tokens)[name]
    assert counts.cached == 10 * len(finished)
    assert counts.encoded == 240 - counts.cached
    after = parts(data)
    assert len(after) == 24
    assert {name: after[name] for name in finished} == finished  # not written a second time
    whole = tiny.write_dataset(str(tmp_path / "whole"), texts)
    encode(whole, workers=0, shard=10, tokens=tokens)
    rows = [Dataset.open(path).token_rows if tokens else Dataset.open(path).feature_rows for path in (data, whole)]
    np.testing.assert_allclose(rows[0](name, 0, 240)[0], rows[1](name, 0, 240)[0], atol=4e-3 if tokens else 1e-3)


@pytest.mark.multiprocess
def test_ray_workers_give_the_same_features(tmp_path: Path, bert: str, vit: str, cluster: None) -> None:
    texts: list[str | None] = list(tiny.texts(60))
    images: list[bytes | None] = [tiny.jpeg(seed) for seed in range(60)]
    texts[5], images[6], images[7] = None, None, b"damaged"
    alone = tiny.write_dataset(str(tmp_path / "alone"), texts, images)
    shared = tiny.write_dataset(str(tmp_path / "shared"), texts, images)
    here = encode(alone, text=bert, image=vit, workers=0, shard=7)
    there = encode(shared, text=bert, image=vit, workers=2, shard=7)
    assert here == there
    for name in ("text", "image"):
        for found, wanted in zip(tiny.rows(shared, name), tiny.rows(alone, name)):
            np.testing.assert_allclose(found, wanted, atol=2e-3)
    assert parts(alone).keys() == parts(shared).keys()


@pytest.mark.multiprocess
def test_a_given_cluster_is_used_and_kept_when_encoding_is_refused(tmp_path: Path, bert: str, cluster: None) -> None:
    import ray

    broken = Path(tiny.text_model(tmp_path / "bert"))
    (broken / "model.safetensors").write_bytes(b"no weights")
    data = tiny.write_dataset(str(tmp_path / "data"), tiny.texts(5))
    with pytest.raises(InputError, match=r"encode has 2 workers with 3 threads, which is 6 CPUs, .* has 2"):
        encode(data, text=bert, workers=2, threads=3)
    assert not parts(data)
    with pytest.raises(InputError, match="cannot be loaded"):
        encode(data, text=str(broken), workers=1)
    assert ray.is_initialized()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin"])
def test_weights_that_are_a_pickle_are_refused(tmp_path: Path, name: str) -> None:
    folder = Path(tiny.text_model(tmp_path / "bert"))
    torch.save(load_file(folder / "model.safetensors"), folder / name)
    (folder / "model.safetensors").unlink()
    data = tiny.write_dataset(str(tmp_path / "data"), tiny.texts(5))
    with pytest.raises(InputError, match="weights in safetensors files"):
        encode(data, text=str(folder), workers=0)


def test_a_dataset_on_s3(s3: str, bert: str) -> None:
    data = tiny.write_dataset(f"{s3}/shop", tiny.texts(25))
    assert encode(data, text=bert, workers=0, shard=10)["text"].encoded == 25
    assert encode(data, text=bert, workers=0, shard=10)["text"].cached == 25
    check(data)


def test_only_the_modalities_there_are_and_asked_for(tmp_path: Path, bert: str, vit: str) -> None:
    data = tiny.write_dataset(str(tmp_path / "data"), tiny.texts(4), [tiny.jpeg(seed) for seed in range(4)])
    assert list(encode(data, text="none", image=vit, workers=0)) == ["image"]
    assert list(Dataset.open(data).manifest.features) == ["image"]
    with pytest.raises(InputError, match="no text or image left to encode"):
        encode(data, text="none", image="none")
    only_text = tiny.write_dataset(str(tmp_path / "texts"), tiny.texts(4))
    with pytest.raises(InputError, match="has no image to encode"):
        encode(only_text, image=vit, workers=0)
    assert list(encode(only_text, text=bert, workers=0)) == ["text"]


def test_an_imported_feature_is_not_replaced(tmp_path: Path, bert: str) -> None:
    data = tiny.write_dataset(str(tmp_path / "data"), tiny.texts(4))
    dataset = Dataset.open(data)
    imported = FeatureEntry(width=2, dtype="float32", missing=0, source="text_feat.npy", parts=[])
    write_manifest(dataset.folder, dataset.manifest.model_copy(update={"features": {"text": imported}}))
    with pytest.raises(InputError, match=r"imported feature 'text' \(from text_feat.npy\)"):
        encode(data, text=bert, workers=0)


def test_unusable_arguments_and_a_broken_cache_are_refused(tmp_path: Path, bert: str) -> None:
    data = tiny.write_dataset(str(tmp_path / "data"), tiny.texts(4))
    with pytest.raises(InputError, match="'--workers' is -1"):
        encode(data, workers=-1)
    with pytest.raises(InputError, match="unknown text encoder 'all-minilm'"):
        encode(data, text="all-minilm")
    encode(data, text=bert, workers=0)
    (part,) = Path(data).glob("encoded/*/part-*.parquet")
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(InputError, match=f"{part.name}' cannot be read"):
        encode(data, text=bert, workers=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        encode(data, text=bert, workers=0, cache=str(tmp_path / "file"))
