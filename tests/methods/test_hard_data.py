"""Every method on edge-case data: it trains a few steps to finite values, or an InputError refuses the data.

Which data a method refuses, and in which words, lies beside it (`beside.py`).
"""

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
from tests.methods import beside
from tests.methods.bare import run_config, write

USERS, ITEMS, WIDTHS, STEPS = 11, 13, {"text": 6, "image": 5}, 3
TOKENS = {"text-tokens": (3, 6), "image-tokens": (2, 5)}  # tokens per item, and their width


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
        "histories of one item": (USERS, ITEMS, [(3, 5), (4, 6)], drawn()),
        "one history of two items": (USERS, ITEMS, [(3, 5), (4, 6), (4, 2), (9, 6)], drawn()),
        "repeated pairs": (USERS, ITEMS, ring * 3, drawn()),
        "zero rows": (USERS, ITEMS, ring, zero_rows),
        "all equal": (USERS, ITEMS, ring, {name: np.full((ITEMS, width), 0.3) for name, width in WIDTHS.items()}),
        "all missing": (USERS, ITEMS, ring, {name: np.full((ITEMS, width), np.nan) for name, width in WIDTHS.items()}),
        "enormous features": (USERS, ITEMS, ring, {name: values * 1e4 for name, values in drawn().items()}),
        "fewer items than neighbours": (5, 3, [(0, 0), (0, 1), (1, 2), (2, 1), (2, 2), (4, 0), (4, 2)], drawn(3)),
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


def work(paths: dict[str, str], cases: dict[str, dict[str, Any]]) -> dict[tuple[str, str], str]:
    """The outcome of every case on every dataset: "finite", "NaN or infinite" or the error message."""
    quiet()
    out = {}
    for case, settings in cases.items():
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
    paths = datasets(tmp_path)
    results = run_workers(work, size, paths, beside.cases(), timeout=500)
    assert all(outcomes == results[0] for outcomes in results)
    unexpected = []
    for (case, data), outcome in results[0].items():
        told = beside.small(case.partition(",")[0]).refuses.get(data)
        if outcome != "finite" if told is None else not outcome.startswith("InputError: ") or told not in outcome:
            unexpected.append(f"{case}, {data}: {outcome}, not {told or 'finite'}")
    assert unexpected == []


def test_the_data_that_is_refused_exists(tmp_path: Path):
    names = {name for method in METHODS for name in beside.small(method).refuses}
    assert names <= datasets(tmp_path).keys()


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
