"""Every method on edge-case data: it trains a few steps to finite values, or an InputError refuses the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distrec.config import RunConfig
from distrec.data.dataset import Dataset
from distrec.errors import InputError, NonFiniteLoss
from distrec.methods.registry import METHODS
from distrec.parallel.world import World
from distrec.runtime import quiet
from distrec.training.launch import check_inputs
from tests.distributed import run_workers
from tests.methods.bare import run_config, write

USERS, ITEMS, WIDTHS, STEPS = 11, 13, {"text": 6, "image": 5}, 3
TOKENS = {"text-tokens": (3, 6), "image-tokens": (2, 5)}  # tokens per item, and their width
# There are more neighbours than items in the smallest dataset. STAIR refuses this; the others use all items.
ALIGNREC: dict[str, Any] = {"name": "alignrec", "dim": 4, "knn_k": 4, "sim_weight": 0.3, "cl_loss": 0.1}
MENTOR: dict[str, Any] = {"name": "mentor", "dim": 4, "knn_k": 4, "mask_weight_g": 0.1}
SASREC: dict[str, Any] = {"name": "sasrec", "dim": 4, "length": 4}
ODMT: dict[str, Any] = {"name": "odmt", "dim": 4, "id_dim": 4, "length": 4, "alpha": 2, "init": 0}
BIVREC: dict[str, Any] = {"name": "bivrec", "dim": 4, "length": 4, "interests": 3}
CASES: dict[str, dict[str, Any]] = {
    "popularity": {"name": "popularity"},
    "bprmf": {"name": "bprmf", "dim": 4, "reg": 0.01},
    "lightgcn": {"name": "lightgcn", "dim": 4, "layers": 2, "reg": 0.01},
    "alignrec": ALIGNREC,
    "alignrec, layer norm": ALIGNREC | {"layer_norm": True, "moving_target": False, "fill": "zeros"},
    "stair": {"name": "stair", "dim": 4, "neighbours": [3, 1]},
    "mentor": MENTOR,
    "mentor, intent": MENTOR | {"variant": "intent"},
    "mentor, intent, nearly all masked": MENTOR | {"variant": "intent", "dropout": 0.99, "temperature": 0.03},
    "sasrec": SASREC,
    "odmt": ODMT,
    "odmt, tied": ODMT | {"init": 3, "id_dim": 6, "tie_cls_feature": True, "dedupe": False, "version": "v3"},
    "bivrec": BIVREC,
    "bivrec, aligned": BIVREC | {"gaussian": "position", "allocation": "aligned", "gumbel": "close", "rank_by": "both"},
    "bivrec, prototype": BIVREC | {"level": "prototype", "modality": "both"},
}
EQUAL, MISSING, FEW, SHORT = "all equal", "all missing", "fewer items than neighbours", "histories of one item"
NO_DIRECTION = "feature 'text' has 0 independent directions but 'method.dim' is 4"
NO_HISTORY = "' has no user with a training history long enough for {}; prepare it with a larger 'k_core.users'."
BIVREC_TITLES = {
    "bivrec": "bivrec (reconstruction, ranked by id)",
    "bivrec, aligned": "bivrec (reconstruction, ranked by both)",
    "bivrec, prototype": "bivrec (prototype)",
}
# Every (case, data) that is refused, with a part of the message. All others must train.
REFUSED = {
    ("stair", EQUAL): NO_DIRECTION,
    ("stair", MISSING): NO_DIRECTION,
    ("stair", FEW): "'method.neighbours' has 3 for feature 'text', which must be less than the 3 items",
    ("sasrec", SHORT): NO_HISTORY.format("sasrec"),
    ("odmt", SHORT): NO_HISTORY.format("odmt"),
    ("odmt, tied", SHORT): NO_HISTORY.format("odmt"),
}
# BiVRec trains on users with more than four items.
REFUSED |= {
    (case, data): NO_HISTORY.format(title)
    for case, title in BIVREC_TITLES.items()
    for data in (SHORT, "one history of two items", FEW, "fewest items", "two users")
}


def drawn(rows: int = ITEMS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    return {name: rng.normal(size=(rows, width)) for name, width in WIDTHS.items()}


def tokens_of(features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tokens per item: the feature itself and fractions of it. Every third text has one token fewer."""
    out = {}
    for name, (count, width) in TOKENS.items():
        values = features[name.removesuffix("-tokens")]
        out[name] = values[:, None, :width] / np.arange(1, count + 1)[:, None]
    out["text-tokens"][::3, -1] = np.nan
    return out


def datasets(folder: Path) -> dict[str, str]:
    ring = [(user, (user + shift) % ITEMS) for user in range(USERS) for shift in (0, 2, 3, 7, 8)]
    halves = [(u, i) for u in range(10) for i in range(12) if (u < 5) == (i < 6) and (u + i) % 5]
    zero_rows, two_blocks = drawn(), drawn()
    for values in zero_rows.values():
        values[[0, 4, 12]] = 0
    for number, values in enumerate(two_blocks.values()):  # each item's neighbours are in its own half
        values[:7, : 2 + number], values[7:, 2 + number :] = 0, 0
    made: dict[str, tuple[int, int, Sequence[tuple[int, int]], dict[str, np.ndarray]]] = {
        # Users 0 to 4 and items 0 to 5 have no interactions with the others; user 10 and item 12 have none at all.
        "isolated components": (USERS, ITEMS, halves, two_blocks),
        SHORT: (USERS, ITEMS, [(3, 5), (4, 6)], drawn()),
        "one history of two items": (USERS, ITEMS, [(3, 5), (4, 6), (4, 2), (9, 6)], drawn()),
        "repeated pairs": (USERS, ITEMS, ring * 3, drawn()),
        "zero rows": (USERS, ITEMS, ring, zero_rows),
        EQUAL: (USERS, ITEMS, ring, {name: np.full((ITEMS, width), 0.3) for name, width in WIDTHS.items()}),
        MISSING: (USERS, ITEMS, ring, {name: np.full((ITEMS, width), np.nan) for name, width in WIDTHS.items()}),
        "enormous features": (USERS, ITEMS, ring, {name: values * 1e4 for name, values in drawn().items()}),
        FEW: (5, 3, [(0, 0), (0, 1), (1, 2), (2, 1), (2, 2), (4, 0), (4, 2)], drawn(3)),
        "fewest items": (3, 6, [(0, 0), (0, 1), (1, 2), (2, 3), (2, 5)], drawn(6)),
        "two users": (2, ITEMS, [(0, 2), (0, 5), (1, 3)], drawn()),
    }  # fmt: skip
    return {
        name: write(folder / name.replace(" ", "-"), users, items, train, features, tokens=tokens_of(features))
        for name, (users, items, train, features) in made.items()
    }


def train(config: RunConfig) -> list[torch.Tensor]:
    """My part of the whole state, of the vectors and of the scores, after a few steps."""
    from distrec.training.engine import Engine

    engine = Engine(World.current(), Dataset.open(config.data), config)
    before = {name: local(value).clone() for name, value in engine.state().items()}
    for count in range(STEPS if engine.method.trainable else 0):
        epoch, step = divmod(count, engine.steps_per_epoch)
        engine.train_step(epoch, step, engine.samples(epoch, step))
    after = {name: local(value) for name, value in engine.state().items()}
    if engine.method.trainable:
        moved = sum(float((after[name] - before[name]).abs().sum()) for name in after if name.endswith(".weight"))
        assert engine.world.sum_(torch.tensor(moved)) > 0, "training changes no weight"
    final = engine.representations("test")
    with torch.no_grad():
        items = engine.world.gather_blocks(final.items, engine.space.items)
        return [*after.values(), final.users, final.items, engine.method.score(final.users, items)]


def local(value: Any) -> torch.Tensor:
    mine: torch.Tensor = value.to_local() if hasattr(value, "to_local") else value
    return mine.detach()


def work(paths: dict[str, str]) -> dict[tuple[str, str], str]:
    """The outcome of every method on every dataset: "finite", "NaN or infinite" or the error message."""
    quiet()
    out = {}
    for case, settings in CASES.items():
        optimizer = {"name": "adamw", "lr": 0.05, "weight_decay": 0.1}
        for name, path in paths.items():
            config = run_config(settings, train={"global_batch": 8}, optimizer=optimizer).model_copy(
                update={"data": path}
            )
            try:
                check_inputs(config)
                finite = all(values.isfinite().all() for values in train(config))
                out[case, name] = "finite" if finite else "NaN or infinite"
            except (InputError, NonFiniteLoss) as error:
                out[case, name] = f"{type(error).__name__}: {error}"
            except Exception as error:
                raise RuntimeError(f"{case} fails on the data '{name}'") from error
    return out


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [1, 2, pytest.param(3, marks=pytest.mark.wide)])
def test_a_few_steps_stay_finite_or_the_data_is_refused(size: int, tmp_path: Path):
    results = run_workers(work, size, datasets(tmp_path), timeout=500)
    assert all(outcomes == results[0] for outcomes in results)
    failed = {pair: outcome for pair, outcome in results[0].items() if pair not in REFUSED and outcome != "finite"}
    assert failed == {}
    for pair, sentence in REFUSED.items():
        outcome = results[0][pair]
        assert outcome.startswith("InputError: "), f"{pair}: {outcome}"
        assert sentence in outcome, pair


def test_every_method_has_a_case():
    assert {settings["name"] for settings in CASES.values()} == set(METHODS)


def test_the_isolated_components_are_isolated(tmp_path: Path):
    """No user of one half has an item of the other, and texts and images of different halves are orthogonal."""
    data = Dataset.open(datasets(tmp_path)["isolated components"])
    train = data.interactions("train")
    assert set(((train.user < 5) == (train.item < 6)).tolist()) == {True}
    assert not {10} & set(train.user.tolist())
    assert not {12} & set(train.item.tolist())
    for name in WIDTHS:
        values, _ = data.feature_rows(name, 0, ITEMS)
        assert not (values[:7] @ values[7:].T).any()
