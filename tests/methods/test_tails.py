"""ODMT with encoders whose last layers train: it starts as with frozen ones, trains alike at any size, and resumes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distrec.cli import main
from distrec.config import RunConfig, decode
from distrec.data.dataset import Dataset
from distrec.data.manifest import write_manifest
from distrec.encoders.encode import encode
from distrec.errors import InputError
from distrec.methods.odmt import ODMT
from distrec.methods.registry import build_method, resolve
from distrec.parallel.world import World
from distrec.runtime import quiet
from distrec.training.engine import Engine
from tests.distributed import run_workers
from tests.encoders import tiny
from tests.oracle.gather import table_weights
from tests.training import small
from tests.training.random_data import write_random

USERS, ITEMS, STEPS = 13, 23, 4
METHOD: dict[str, Any] = {"name": "odmt", "dim": 8, "id_dim": 24, "init": 3, "length": 4, "dropout": 0.0, "alpha": 2}
# Dataset (one per image encoder), ZeRO stage, method, optimizer.
RUNS: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "vit": ("vit", 0, METHOD, {"name": "adam", "lr": 1e-2}),
    "vit, ZeRO 2": ("vit", 2, METHOD, {"name": "adam", "lr": 1e-2}),
    "vit, ZeRO 3": ("vit", 3, METHOD, {"name": "adam", "lr": 1e-2}),
    "two layers": ("vit", 3, METHOD | {"train_encoder_layers": 2, "dedupe": False}, {"name": "sgd", "lr": 0.05}),
    "efficientnet": ("efficientnet", 0, METHOD, {"name": "adamw", "lr": 1e-3, "clip_norm": 1.0}),
    "efficientnet, ZeRO 3": ("efficientnet", 3, METHOD, {"name": "adamw", "lr": 1e-3, "clip_norm": 1.0}),
}
TOGETHER = ("vit", "two layers", "efficientnet, ZeRO 3")  # with two workers
SAME = {"vit": ("vit, ZeRO 2", "vit, ZeRO 3"), "efficientnet": ("efficientnet, ZeRO 3",)}


def join(path: Path, content: str) -> str:
    """A random dataset with the feature sets of another one that has equally many items."""
    write_random(path, USERS, ITEMS, 90, 0)
    there, here = Dataset.open(content), Dataset.open(str(path))
    for name in there.manifest.features:
        shutil.copytree(Path(content, "features", name), path / "features" / name, dirs_exist_ok=True)
    features = here.manifest.features | there.manifest.features
    files = here.manifest.files | {name: x for name, x in there.manifest.files.items() if name.startswith("features/")}
    files = {name: x for name, x in files.items() if not name.startswith("features/") or name in listed(features)}
    write_manifest(here.folder, here.manifest.model_copy(update={"features": features, "files": files}))
    return str(path)


def listed(features: dict[str, Any]) -> set[str]:
    return {part for entry in features.values() for part in entry.parts}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets `vit` and `efficientnet` with states after all layers and before the last; in `vit` also before two."""
    root = tmp_path_factory.mktemp("tails")
    bert = tiny.text_model(root / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    images: list[bytes | None] = [tiny.jpeg(seed, 40, 40) for seed in range(ITEMS)]
    texts: list[str | None] = list(tiny.texts(ITEMS))
    images[3], texts[5], images[8], texts[8] = None, None, None, None
    for name, image, pool, cuts in (
        ("vit", tiny.vit_model(root / "model-vit"), None, (None, 1, 2)),
        ("efficientnet", None, 2, (None, 1)),
    ):
        content = tiny.write_dataset(str(root / f"content-{name}"), texts, images)
        for cut in cuts:
            encode(content, bert, image, workers=0, tokens=True, text_tokens=9, image_pool=pool, batch=ITEMS, cut=cut)
        join(root / name, content)
    return root


def config(data: Path | str, method: dict[str, Any], stage: int, optimizer: dict[str, Any], **dense: Any) -> RunConfig:
    tree = {
        "data": str(data), "run": {"name": "r"}, "method": method, "optimizer": optimizer,
        "dense": {"zero_stage": stage, **dense}, "train": {"global_batch": 6, "seed": 3},
    }  # fmt: skip
    return resolve(decode(RunConfig, tree))


def trained(folder: str, name: str, layers: int | None = None, **dense: Any) -> dict[str, Any]:
    """Train a few steps: losses, gradients of the first step, and weights before and after."""
    data, stage, method, optimizer = RUNS[name]
    method = {"train_encoder_layers": 1, **method} | ({} if layers is None else {"train_encoder_layers": layers})
    settings = config(Path(folder, data), method, stage, optimizer, **dense)
    engine = Engine(World.current(), Dataset.open(settings.data), settings)
    engine.set_lr(settings.optimizer.lr)
    start, losses, gradients = weights(engine), [], {}
    for count in range(STEPS):
        epoch, step = divmod(count, engine.steps_per_epoch)
        terms, _ = engine.forward_backward(epoch, step, engine.samples(epoch, step))
        gradients = gradients or {key: value.numpy() for key, value in engine.dense.gradients().items()}
        engine.update()
        losses.append(sum(terms.values()))
    found = engine.representations()
    assert all(torch.isfinite(x).all() for x in (found.users, found.items))
    return {"start": start, "losses": losses, "gradients": gradients, "end": weights(engine)}


def weights(engine: Engine) -> dict[str, np.ndarray]:
    dense = {
        key.removesuffix(".weight"): x.numpy() for key, x in engine.dense.state().items() if key.endswith(".weight")
    }
    return dense | table_weights(engine, {"item": "item"})


def train_all(folder: str) -> dict[str, Any]:
    quiet()
    alone = World.current().size == 1
    out = {name: trained(folder, name) for name in (RUNS if alone else TOGETHER)}
    if alone:
        out |= {f"frozen {name}": trained(folder, name, layers=0) for name in ("vit", "efficientnet")}
        out["again"] = trained(folder, "vit, ZeRO 3", activation_checkpointing=True)
    return out


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, Any]:
    return dict(run_workers(train_all, 1, str(root), timeout=400)[0])


def agree(found: dict[str, Any], wanted: dict[str, Any], lr: float) -> None:
    np.testing.assert_allclose(found["losses"], wanted["losses"], rtol=1e-5)
    for kind in ("start", "gradients", "end"):
        assert found[kind].keys() == wanted[kind].keys()
        for key, value in wanted[kind].items():
            gap = np.abs(found[kind][key] - value)
            bound = 2e-4 * max(1e-2, np.abs(value).max()) if kind == "gradients" else 1e-4
            assert np.quantile(gap, 0.99, method="lower") <= bound, f"{kind} {key}"
            assert gap.max() <= max(bound, lr * STEPS), f"{kind} {key}"


@pytest.mark.multiprocess
def test_everything_starts_as_with_frozen_encoders_and_then_trains(alone: dict[str, Any]) -> None:
    for name in ("vit", "efficientnet"):
        frozen, tuned = alone[f"frozen {name}"], alone[name]
        np.testing.assert_allclose(tuned["losses"][0], frozen["losses"][0], rtol=1e-3)  # stored states are float16
        np.testing.assert_allclose(tuned["start"]["item"], frozen["start"]["item"], atol=1e-2)
        assert abs(tuned["losses"][-1] - frozen["losses"][-1]) > 1e-3 * abs(frozen["losses"][-1])
        tails = [key for key in tuned["end"] if key.startswith("tails.")]
        assert {key.split(".")[1] for key in tails} == {"text", "image"}
        assert {key for key in tuned["end"] if key not in tails} == {
            key if key == "item" else f"reader.{key}" for key in frozen["end"]
        }
        for key in tails:
            moved = not np.array_equal(tuned["start"][key], tuned["end"][key])
            assert moved, key
            assert np.any(tuned["gradients"][key]), key


@pytest.mark.multiprocess
def test_zero_stages_and_recomputation_change_nothing(alone: dict[str, Any]) -> None:
    for name, others in SAME.items():
        for other in others:
            agree(alone[other], alone[name], RUNS[name][3]["lr"])
    agree(alone["again"], alone["vit"], RUNS["vit"][3]["lr"])
    with pytest.raises(AssertionError):
        agree(alone["two layers"], alone["vit"], 1.0)


@pytest.mark.multiprocess
def test_two_workers_give_the_same_trajectory(root: Path, alone: dict[str, Any]) -> None:
    for name, found in run_workers(train_all, 2, str(root), timeout=400)[0].items():
        agree(found, alone[name], RUNS[name][3]["lr"])


def test_a_crash_changes_nothing(tmp_path: Path, root: Path) -> None:
    path = small.write_config(
        tmp_path / "run.yaml", str(root / "vit"), tmp_path, "odmt",
        train={"global_batch": 6, "epochs": 2, "checkpoint_every": 1}, dense={"zero_stage": 3},
    )  # fmt: skip
    keys = ["method.train_encoder_layers=1", "method.id_dim=24"]
    assert main(["train", path, "run.name=whole", *keys]) == 0
    with small.crash_at((1, 1)):
        assert main(["train", path, *keys]) == 1
    assert main(["train", path, *keys]) == 0
    small.same_losses(tmp_path / "whole", tmp_path / "run", rtol=0)
    want, got = small.tensors(tmp_path / "whole"), small.tensors(tmp_path / "run")
    assert [name for name in want if not want[name].equal(got[name])] == []
    assert any(name.startswith("dense.tails.image") for name in want)


def test_sets_that_do_not_fit_are_refused(tmp_path: Path, root: Path) -> None:
    data = Dataset.open(str(root / "vit"))
    for method, message in (
        ({"train_encoder_layers": 3}, "is 'text-tokens-cut3', which is not in the dataset, .* --tokens --cut 3'"),
        ({"train_encoder_layers": 2, "text_tokens": "text-tokens-cut1"}, "was cut before the last 1, but .* is 2; run"),
        ({"train_encoder_layers": 1, "image_tokens": "image-tokens"}, "'method.image_tokens' is .* holds no encoder's"),
        ({"text_tokens": "text-tokens-cut1"}, "cut before the last 1, but 'method.train_encoder_layers' is 0; set it"),
        ({"train_encoder_layers": 1, "tie_cls_feature": True}, "is true, which ties the ID table to a frozen feature"),
        ({"train_encoder_layers": 1, "init": 1}, "but 'text-tokens-cut1' is 24 wide and 'image-tokens-cut1' 16"),
        ({"train_encoder_layers": -1}, "key 'method.train_encoder_layers'"),
    ):
        with pytest.raises(InputError, match=message) as told:
            build_method(config(root / "vit", METHOD | method, 0, {}), data)
        assert "\n" not in str(told.value)
    # The width after EfficientNet's last layers, not that of the stored feature map.
    with pytest.raises(InputError, match=r"'image-tokens-cut1', 1280 wide, but 'method\.id_dim' is 24"):
        build_method(
            config("", METHOD | {"train_encoder_layers": 1, "init": 2}, 0, {}), Dataset.open(str(root / "efficientnet"))
        )


def test_an_encoder_that_is_gone_is_told_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bert, vit = tiny.text_model(tmp_path / "bert"), tiny.vit_model(tmp_path / "vit")
    images = [tiny.jpeg(seed) for seed in range(ITEMS)]
    content = tiny.write_dataset(str(tmp_path / "content"), tiny.texts(ITEMS), images)
    encode(content, bert, vit, workers=0, tokens=True, cut=1)
    path = small.write_config(tmp_path / "run.yaml", join(tmp_path / "data", content), tmp_path, "odmt")
    shutil.rmtree(vit)
    assert main(["train", path, "method.train_encoder_layers=1", "method.init=0"]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"encoder '{vit}' is not there any more" in told
    assert not (tmp_path / "run").exists()


def test_names_of_sets_follow_from_the_layers() -> None:
    for layers, ending in ((0, ""), (2, "-cut2")):
        found = ODMT.Config(name="odmt", train_encoder_layers=layers)
        assert (found.text_tokens, found.image_tokens) == (f"text-tokens{ending}", f"image-tokens{ending}")
