"""Both graph methods on data at the edges: they train on to finite values, or refuse it in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distrec.data.dataset import Dataset
from distrec.errors import InputError
from distrec.parallel.world import World
from distrec.runtime import quiet
from tests.distributed import run_workers
from tests.methods.bare import run_config, write

USERS, ITEMS, WIDTHS, STEPS = 11, 13, {"text": 6, "image": 5}, 3
STAIR: dict[str, Any] = {"name": "stair", "dim": 4, "neighbours": [3, 1]}
MENTOR: dict[str, Any] = {"name": "mentor", "dim": 4, "knn_k": 3, "mask_weight_g": 0.1}
METHODS: dict[str, dict[str, Any]] = {
    "stair": STAIR,
    "mentor": MENTOR,
    "mentor, intent": MENTOR | {"variant": "intent"},
    "mentor, intent, nearly all masked": MENTOR | {"variant": "intent", "dropout": 0.99, "temperature": 0.03},
}
ALL_EQUAL = "all feature rows equal"
REFUSED = {("stair", ALL_EQUAL), ("stair", "all features missing")}


def drawn(rows: int = ITEMS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    return {name: rng.normal(size=(rows, width)) for name, width in WIDTHS.items()}


def datasets(folder: Path) -> dict[str, str]:
    ring = [(user, (user + shift) % ITEMS) for user in range(USERS) for shift in (0, 2, 3)]
    zero_rows, two_blocks = drawn(), drawn()
    for values in zero_rows.values():
        values[[0, 4, 12]] = 0
    for number, values in enumerate(two_blocks.values()):  # neighbours within each half of the items only
        values[:7, : 2 + number], values[7:, 2 + number :] = 0, 0
    made = {
        # Users 0 to 4 and items 0 to 5 never meet the others; users 10 and item 12 meet no one.
        "isolated components": (
            USERS, ITEMS, [(u, i) for u in range(10) for i in range(12) if (u < 5) == (i < 6) and (u + i) % 3], two_blocks,
        ),
        "one pair": (USERS, ITEMS, [(3, 5), (4, 6)], drawn()),
        "repeated pairs": (USERS, ITEMS, ring * 3, drawn()),
        "zero rows": (USERS, ITEMS, ring, zero_rows),
        ALL_EQUAL: (USERS, ITEMS, ring, {name: np.full((ITEMS, width), 0.3) for name, width in WIDTHS.items()}),
        "all features missing": (USERS, ITEMS, ring, {name: np.full((ITEMS, w), np.nan) for name, w in WIDTHS.items()}),
        "enormous features": (USERS, ITEMS, ring, {name: values * 1e4 for name, values in drawn().items()}),
        "fewest items": (3, 6, [(0, 0), (0, 1), (1, 2), (2, 3), (2, 5)], drawn(6)),
        "two users": (2, ITEMS, [(0, 2), (0, 5), (1, 3)], drawn()),
    }  # fmt: skip
    return {
        name: write(folder / name.replace(" ", "-"), users, items, train, features)
        for name, (users, items, train, features) in made.items()
    }


def train(path: str, method: dict[str, Any]) -> list[torch.Tensor]:
    """My tables, dense weights and vectors after a few steps."""
    from distrec.training.engine import Engine

    config = run_config(method, train={"global_batch": 8}, optimizer={"name": "adamw", "lr": 0.05, "weight_decay": 0.1})
    engine = Engine(World.current(), Dataset.open(path), config)
    before = [engine.tables.block(name).detach().clone() for name in engine.tables.specs]
    for epoch in range(STEPS):
        share, terms, _ = engine.forward(engine.batch(epoch, 0, engine.samples(epoch, 0)))
        assert all(np.isfinite(value) for value in terms.values()), terms
        engine.update(share)
    final = engine.representations()
    after = [engine.tables.block(name).detach().clone() for name in engine.tables.specs]
    moves = sum(float((one - other).abs().sum()) for one, other in zip(before, after, strict=True))
    assert engine.world.sum_(torch.tensor(moves)) > 0, "training moves nothing"
    return [*after, *(value for _, value in sorted(engine.dense.state().items())), final.users, final.items]


def work(paths: dict[str, str]) -> dict[tuple[str, str], str]:
    """What becomes of every method on every dataset: "finite", or the refusal."""
    quiet()
    out = {}
    for method, settings in METHODS.items():
        for name, path in paths.items():
            try:
                finite = all(values.isfinite().all() for values in train(path, settings))
                out[method, name] = "finite" if finite else "NaN or infinite"
            except InputError as error:
                out[method, name] = f"refused: {error}"
    return out


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [1, 2, 3])
def test_three_steps_stay_finite_or_the_data_is_refused(size: int, tmp_path: Path):
    paths = datasets(tmp_path)
    results = run_workers(work, size, paths, timeout=500)
    assert all(told == results[0] for told in results)
    wrong = {place: told for place, told in results[0].items() if place not in REFUSED and told != "finite"}
    assert wrong == {}
    for place in REFUSED:
        told = results[0][place]
        assert told.startswith("refused: feature 'text' has 0 independent directions but 'method.dim' is 4"), told


def test_the_isolated_components_are_what_they_say(tmp_path: Path):
    """No user of one half has an item of the other, and no text or image is like one of the other half."""
    data = Dataset.open(datasets(tmp_path)["isolated components"])
    train = data.interactions("train")
    assert set(((train.user < 5) == (train.item < 6)).tolist()) == {True}
    assert not {10} & set(train.user.tolist())
    assert not {12} & set(train.item.tolist())
    for name in WIDTHS:
        values, _ = data.feature_rows(name, 0, ITEMS)
        assert not (values[:7] @ values[7:].T).any()
