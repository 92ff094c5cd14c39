"""Hidden states before an encoder's last layers, passed through these layers, equal the whole encoder's output."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distrec.data.check import check
from distrec.data.dataset import Dataset
from distrec.encoders.encode import encode
from distrec.encoders.registry import make_encoder
from distrec.encoders.stored import stored_encoder
from distrec.encoders.tail import Tail
from distrec.errors import InputError
from tests.encoders import tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {
        "bert": tiny.text_model(root / "bert"),
        "roberta": tiny.text_model(root / "roberta", kind="Roberta"),
        "vit": tiny.vit_model(root / "vit"),
        "dinov2": tiny.vit_model(root / "dinov2", kind="Dinov2"),
        "clip": tiny.clip_model(root / "clip"),
        "resnet": tiny.resnet_model(root / "resnet"),
    }


def stored(path: str, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Values `[items, tokens, width]` and which tokens are real."""
    dataset = Dataset.open(path)
    values, count, _ = dataset.token_rows(name, 0, dataset.items)
    return torch.from_numpy(values).float(), torch.arange(values.shape[1]) < torch.from_numpy(count)[:, None]


def both(data: str, modality: Any, cut: int, **options: Any) -> tuple[Dataset, Tail]:
    """Write the cut and the uncut token set; return the dataset and the tail that its manifest leads to."""
    for layers in (None, cut):
        encode(data, workers=0, shard=4, tokens=True, cut=layers, **options)
    dataset = Dataset.open(data)
    tail = stored_encoder(dataset, "method.key", f"{modality}-tokens-cut{cut}", modality, cut).tail()
    assert not tail.training
    return dataset, tail


def same(data: str, modality: str, cut: int, tail: Tail, atol: float) -> None:
    """The tail turns the cut states into the uncut set; an item without content gets one zero vector."""
    values, real = stored(data, f"{modality}-tokens-cut{cut}")
    wanted, known = stored(data, f"{modality}-tokens")
    with torch.no_grad():
        found, told = tail(values, real)
    np.testing.assert_allclose(found.numpy(), wanted.numpy(), atol=atol, rtol=4e-3)
    first = torch.arange(known.shape[1]) == 0
    assert told.equal(known | first)
    assert (wanted - wanted[:1]).abs().max() > 20 * atol, "items differ by more than the comparison allows"


@pytest.mark.parametrize(("model", "cut"), [("bert", 1), ("bert", 2), ("roberta", 1)])
def test_texts_go_through_the_last_layers(tmp_path: Path, models: dict[str, str], model: str, cut: int) -> None:
    texts: list[str | None] = [*tiny.texts(11), "lamp", "red lamp of wood " * 20]
    texts[3] = None
    data = tiny.write_dataset(str(tmp_path / "data"), texts)
    dataset, tail = both(data, "text", cut, text=models[model], text_tokens=9)
    same(data, "text", cut, tail, 1e-2)
    check(data)
    assert {"text-tokens", f"text-tokens-cut{cut}"} == set(dataset.manifest.features)
    sources = {entry.source for entry in dataset.manifest.features.values()}
    assert len(sources) == 2
    values, real = stored(data, f"text-tokens-cut{cut}")
    beyond = tail(values.masked_fill(~real[..., None], 7.0), real)[0]
    torch.testing.assert_close(beyond, tail(values, real)[0])  # padding has no effect


@pytest.mark.parametrize(("model", "cut"), [("vit", 1), ("vit", 2), ("dinov2", 1), ("clip", 1)])
def test_images_go_through_the_last_layers(tmp_path: Path, models: dict[str, str], model: str, cut: int) -> None:
    images: list[bytes | None] = [tiny.jpeg(seed, 30 + 5 * seed, 60) for seed in range(6)]
    images[4] = b"damaged"
    data = tiny.write_dataset(str(tmp_path / "data"), None, images)
    _, tail = both(data, "image", cut, image=models[model])
    same(data, "image", cut, tail, 1e-2)


@pytest.mark.parametrize(("cut", "side", "shape"), [(1, None, (49, 320)), (3, 3, (49, 192)), (6, None, (196, 112))])
def test_efficientnet_goes_through_its_last_blocks(
    tmp_path: Path, cut: int, side: int | None, shape: tuple[int, int]
) -> None:
    images: list[bytes | None] = [tiny.jpeg(seed, 60, 60) for seed in range(4)]
    images[2] = None
    data = tiny.write_dataset(str(tmp_path / "data"), None, images)
    dataset, tail = both(data, "image", cut, image_pool=side)
    entry = dataset.feature(f"image-tokens-cut{cut}")
    assert (entry.tokens, entry.width) == shape
    same(data, "image", cut, tail, 1e-2)
    before = {name: value.clone() for name, value in tail.state_dict().items()}
    assert not [name for name in before if "running" in name], "no statistics are left to move"
    values, real = stored(data, f"image-tokens-cut{cut}")
    tail.train()
    torch.testing.assert_close(
        tail(values, real)[0][:1], tail(values[:1], real[:1])[0]
    )  # nor have the other items of the batch
    assert {name for name, _ in tail.named_parameters()} == set(before)


def test_minilm_goes_through_its_last_layers(tmp_path: Path) -> None:
    data = tiny.write_dataset(str(tmp_path / "data"), tiny.texts(7))
    _, tail = both(data, "text", 2)
    same(data, "text", 2, tail, 1e-2)


def test_no_items_have_no_states_and_give_no_gradient(tmp_path: Path, models: dict[str, str]) -> None:
    """A worker may own no item of a batch."""
    for modality, name, tokens, last in (("text", models["bert"], 9, 9), ("image", "efficientnet-lite0", 49, 10)):
        encoder = make_encoder(modality, name, 9, False, 3 if modality == "image" else None, 1)  # type: ignore[arg-type]
        tail = encoder.tail().train()
        states, real = tail(torch.zeros(0, tokens, encoder.width), torch.ones(0, tokens, dtype=torch.bool))
        assert (states.shape, real.shape) == ((0, last, encoder.last_width), (0, last))
        states.sum().backward()
        assert all(x.grad is not None and not x.grad.any() for x in tail.parameters())


def test_what_cannot_be_cut_is_refused(tmp_path: Path, models: dict[str, str]) -> None:
    data = tiny.write_dataset(str(tmp_path / "data"), tiny.texts(4), [tiny.jpeg(seed) for seed in range(4)])
    for options, message in (
        ({"cut": 1}, "'--cut' is 1 but --tokens is not given"),
        ({"tokens": True, "cut": 0}, "'--cut' is 0; give 1 to 256"),
        ({"tokens": True, "cut": 3, "text": models["bert"]}, "'--cut' is 3 but '.*bert' has 2 layers; give 1 to 2"),
        ({"tokens": True, "cut": 2, "text": "none", "image": models["clip"]}, "has 1 layers; give 1 to 1"),
        ({"tokens": True, "cut": 1, "text": models["clip"]}, "text model of type 'clip', whose last layers cannot"),
        ({"tokens": True, "cut": 1, "text": "none", "image": models["resnet"]}, "image model of type 'resnet'"),
        ({"tokens": True, "cut": 18, "text": "none"}, "'efficientnet-lite0' has 17 layers to cut before; give 1 to 17"),
    ):
        with pytest.raises(InputError, match=message) as told:
            encode(data, workers=0, **options)  # type: ignore[arg-type]
        assert "\n" not in str(told.value)


def test_an_encoder_that_changed_or_went_away_is_told(tmp_path: Path, models: dict[str, str]) -> None:
    folder, data = tmp_path / "model", tiny.write_dataset(str(tmp_path / "data"), tiny.texts(4))
    shutil.copytree(models["bert"], folder)
    options: dict[str, Any] = {"text": str(folder), "workers": 0, "tokens": True}
    encode(data, **options)
    encode(data, **options, cut=1)

    def ask(name: str = "text-tokens-cut1", layers: int = 1) -> Any:
        return stored_encoder(Dataset.open(data), "method.text_tokens", name, "text", layers)

    assert ask().key == make_encoder("text", str(folder), 30, False, cut=1).key
    for arguments, message in (
        (("text-tokens-cut2", 2), "not in the dataset, .* run 'distrec encode .* --tokens --cut 2' and name 'text-tok"),
        (("text-tokens-cut1", 2), "was cut before the last 1, but 'method.train_encoder_layers' is 2; run"),
        (("text-tokens", 1), "holds no encoder's inner states, .* --cut 1' and name 'text-tokens-cut1'"),
    ):
        with pytest.raises(InputError, match=message):
            ask(*arguments)
    tiny.text_model(folder, seed=1)
    with pytest.raises(InputError, match="has other weights or settings than when it was encoded; run 'distrec encode"):
        ask()
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"encoder '.*model' is not there any more") as told:
        ask()
    assert "\n" not in str(told.value)
