"""STAIR: its schedule, the input that it refuses, nodes without edges, and the closed form of its gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distrec.data.dataset import Dataset
from distrec.errors import InputError
from distrec.methods.registry import method_config
from distrec.methods.stair import stepwise_decay
from distrec.parallel.world import World
from tests.distributed import run_workers
from tests.graph.cases import dense
from tests.methods.bare import Bare, method_of, write
from tests.oracle.gather import sparse_entries

# docs/methods/stair.md section 3.1: gamma; b at columns 0, 1, 16, 32 and 63 of 64; the means of b and beta.
SCHEDULE = [
    (0.1, [0.1, 0.69378, 0.88350, 0.93973, 0.99858], 0.9073, 0.0927),
    (0.2, [0.1, 0.49175, 0.78207, 0.88350, 0.99717], 0.8408, 0.1592),
    (0.4, [0.1, 0.27052, 0.61691, 0.78207, 0.99435], 0.7352, 0.2648),
]
USERS, ITEMS, WIDTHS = 13, 17, {"text": 8, "image": 5}
LONELY = {"users": [0, 5, 12], "items": [0, 6, 16]}  # without training pairs
STAIR: dict[str, Any] = {"name": "stair", "dim": 5, "neighbours": [4, 1], "gamma": 0.4}
CASES = [STAIR, STAIR | {"layers": 0}, STAIR | {"features": ["image"], "neighbours": [3], "layers": 1, "gamma": 2.0}]


def pairs(seed: int = 0) -> list[tuple[int, int]]:
    """Training pairs without the lonely users and items; some pairs occur twice."""
    rng = np.random.default_rng(seed)
    users = np.setdiff1d(np.arange(USERS), LONELY["users"])
    items = np.setdiff1d(np.arange(ITEMS), LONELY["items"])
    found = [(int(user), int(item)) for user in users for item in rng.choice(items, 4, replace=False)]
    return found + found[::7]


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return Dataset.open(made(tmp_path))


def made(folder: Path) -> str:
    rng = np.random.default_rng(1)
    features = {name: rng.normal(size=(ITEMS, width)) for name, width in WIDTHS.items()}
    features["text"][3] = np.nan
    return write(folder, USERS, ITEMS, pairs(), features)


@pytest.mark.parametrize(("gamma", "columns", "mean", "mean_beta"), SCHEDULE)
def test_the_schedule_has_the_specification_s_values(gamma: float, columns: list[float], mean: float, mean_beta: float):
    b = stepwise_decay(64, gamma)
    assert b.dtype == torch.float64
    assert b[[0, 1, 16, 32, 63]].tolist() == pytest.approx(columns, abs=6e-6)
    assert float(b.mean()) == pytest.approx(mean, abs=6e-5)
    assert float((1 - b).mean()) == pytest.approx(mean_beta, abs=6e-5)


@pytest.mark.parametrize("gamma", [0.05, 0.1, 1.0, 7.0])
@pytest.mark.parametrize("dim", [1, 2, 64, 256])
def test_the_schedule_rises_from_a_tenth_and_stays_below_one(dim: int, gamma: float):
    b = stepwise_decay(dim, gamma)
    assert float(b[0]) == pytest.approx(0.1, abs=1e-15)
    assert (b.diff() > 0).all()
    assert float(b[-1]) < 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"neighbours": [5]}, "key 'method.neighbours' has 1 numbers but 'method.features' names 2 sets"),
        ({"neighbours": [5, 1, 1]}, "key 'method.neighbours' has 3 numbers but 'method.features' names 2 sets"),
        ({"neighbours": []}, "key 'method.neighbours' has 0 numbers"),
        ({"neighbours": [5, 0]}, "key 'method.neighbours.1' is 0 but must be greater than or equal to 1"),
        ({"neighbours": [-1, 1]}, "key 'method.neighbours.0' is -1 but must be greater than or equal to 1"),
        (
            {"neighbours": [ITEMS, 1]},
            f"key 'method.neighbours' has {ITEMS} for feature 'text', which must be less than the {ITEMS} items",
        ),
        ({"neighbours": [1, 99]}, f"less than the {ITEMS} items"),
        ({"dim": 6}, "key 'method.dim' is 6 but feature 'image' has 5 columns and 17 rows"),
        ({"dim": 9, "features": ["text"], "neighbours": [2]}, "key 'method.dim' is 9 but feature 'text' has 8 columns"),
        ({"features": []}, "key 'method.features' is empty but stair needs at least one"),
        ({"features": ["text", "sound"]}, "has no feature 'sound'"),
    ],
)  # fmt: skip
def test_what_the_data_cannot_give_is_refused(data: Dataset, settings: dict[str, Any], told: str):
    with pytest.raises(InputError) as error:
        method_of(data, **STAIR | settings)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_more_columns_than_items_are_refused_and_the_largest_k_is_not(tmp_path: Path):
    rng = np.random.default_rng(0)
    wide = {name: rng.normal(size=(6, 40)) for name in WIDTHS}
    few = Dataset.open(write(tmp_path, 3, 6, [(0, 1), (1, 2), (2, 3)], wide))
    with pytest.raises(InputError, match=r"key 'method\.dim' is 7 but feature 'text' has 40 columns and 6 rows"):
        method_of(few, **STAIR | {"dim": 7})
    bare = Bare(World(0, 1), few, STAIR | {"dim": 5, "neighbours": [5, 5]})
    assert bare.tables["item"].shape == (6, 5)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"gamma": 0.0}, "key 'method.gamma' is 0.0 but must be greater than or equal to 0.001"),
        ({"gamma": -0.2}, "key 'method.gamma' is -0.2"),
        ({"layers": -1}, "key 'method.layers' is -1"),
        ({"dim": 0}, "key 'method.dim' is 0"),
        ({"fill": "median"}, "key 'method.fill' is 'median'"),
    ],
)
def test_wrong_settings_are_refused_by_key(settings: dict[str, Any], told: str):
    with pytest.raises(InputError) as error:
        method_config(STAIR | settings)
    assert str(error.value).startswith(told)


# --- against dense float64 algebra ------------------------------------------------------------------------------------


def whole_operator(method: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised adjacency of the distinct pairs, users before items, and the weights of its powers.

    The weights are `(1 - c) / (1 - c^(L+1)) c^l` for c = beta.
    """
    user, item = np.array(sorted(set(pairs()))).T
    beta = 1 - stepwise_decay(method["dim"], method["gamma"])
    powers = torch.stack([beta**power for power in range(method.get("layers", 3) + 1)])
    return dense(user, item, USERS, ITEMS), powers / powers.sum(0)


def convolved(method: Any, x: torch.Tensor) -> torch.Tensor:
    adjacency, weights = whole_operator(method)
    terms = [torch.linalg.matrix_power(adjacency, power) @ x * weight for power, weight in enumerate(weights)]
    return torch.stack(terms).sum(0)


def at_this_size(folder: str) -> list[dict[str, torch.Tensor]]:
    """For each case, whole arrays: initial tables, representations, the loss and its gradient, and the batch."""
    world, data, out = World.current(), Dataset.open(folder), []
    for case in CASES:
        bare = Bare(world, data, case)
        triples = bare.samples(20)
        terms = bare.method.loss(bare.batch(20))
        assert terms.keys() == {"bpr"}
        grads = bare.gradients(terms["bpr"])
        final = bare.final()
        sides = {"user": (bare.users, final.users), "item": (bare.items, final.items)}
        found = {"loss": world.sum_(terms["bpr"].detach().clone())}
        for name, (partition, rows) in sides.items():
            found[name] = bare.whole(bare.tables[name], partition)
            found[f"{name} final"] = bare.whole(rows, partition)
            found[f"{name} gradient"] = bare.whole(grads[name], partition)  # type: ignore[arg-type]
        found["smoothed"] = bare.whole(bare.method.smooth(bare.tables["item"].detach()), bare.items)
        found["S"] = torch.zeros(ITEMS, ITEMS, dtype=torch.float64)
        for place, value in sparse_entries(world, bare.method.item_item).items():
            found["S"][place] = value
        found |= {name: torch.from_numpy(getattr(triples, name)) for name in ("users", "positives", "negatives")}
        out.append(found)
    return out


def check(case: dict[str, Any], found: dict[str, torch.Tensor]) -> None:
    start = torch.cat([found["user"], found["item"]]).double()
    wanted = convolved(case, start)
    final = torch.cat([found["user final"], found["item final"]]).double()
    torch.testing.assert_close(final, wanted, rtol=1e-5, atol=1e-6)

    u, p, n = found["users"], USERS + found["positives"], USERS + found["negatives"]
    difference = (wanted[u] * (wanted[n] - wanted[p])).sum(1)
    assert float(found["loss"]) == pytest.approx(float(torch.nn.functional.softplus(difference).mean()), rel=1e-6)
    slope = difference.sigmoid().unsqueeze(1) / len(u)
    g = torch.zeros_like(wanted)  # dL/dE, which is zero outside the batch's rows
    g.index_add_(0, u, slope * (wanted[n] - wanted[p]))
    g.index_add_(0, p, -slope * wanted[u])
    g.index_add_(0, n, slope * wanted[u])
    gradient = torch.cat([found["user gradient"], found["item gradient"]]).double()
    closed = convolved(case, g)  # 3.6: the operator is symmetric
    torch.testing.assert_close(gradient, closed, rtol=0, atol=1e-5 * float(closed.abs().max()))


def check_smoothing(case: dict[str, Any], found: dict[str, torch.Tensor]) -> None:
    """The operator of 3.2 over similar items, with b in place of 1 - b."""
    powers = torch.stack(
        [stepwise_decay(case["dim"], case["gamma"]) ** power for power in range(case.get("layers", 3) + 1)]
    )
    weights = powers / powers.sum(0)
    start = found["item"].double()
    wanted = sum(torch.linalg.matrix_power(found["S"], power) @ start * weight for power, weight in enumerate(weights))
    torch.testing.assert_close(found["smoothed"].double(), wanted, rtol=1e-5, atol=1e-6)
    degree = (found["S"] > 0).sum(1)
    assert int(degree.min()) >= max(case["neighbours"]), "items without users have neighbours too"


def check_lonely(case: dict[str, Any], found: dict[str, torch.Tensor]) -> None:
    means = torch.zeros(USERS, ITEMS, dtype=torch.float64)
    means[tuple(np.array(sorted(set(pairs()))).T)] = 1
    means = means / means.sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(found["user"].double(), means @ found["item"].double(), rtol=1e-5, atol=1e-6)
    assert not found["user"][LONELY["users"]].any(), "without training items, the mean is zero"
    assert not found["user final"][LONELY["users"]].any()
    assert not found["user gradient"][LONELY["users"]].any(), "it is in no batch and has no neighbours"
    _, weights = whole_operator(case)
    alone = found["item"][LONELY["items"]].double()
    assert alone.abs().max() > 0.1, "items without users have content"
    torch.testing.assert_close(found["item final"][LONELY["items"]].double(), alone * weights[0], rtol=1e-5, atol=1e-7)


def test_gradient_smoothing_and_lonely_nodes_in_one_process(tmp_path: Path):
    for case, found in zip(CASES, at_this_size(made(tmp_path)), strict=True):
        check(case, found)
        check_smoothing(case, found)
        check_lonely(case, found)


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [2, 3])
def test_gradient_smoothing_and_lonely_nodes_at_any_size(size: int, tmp_path: Path):
    folder = made(tmp_path)
    for results in run_workers(at_this_size, size, folder):
        for case, found, alone in zip(CASES, results, at_this_size(folder), strict=True):
            check(case, found)
            check_smoothing(case, found)
            check_lonely(case, found)
            torch.testing.assert_close(found["item"], alone["item"], rtol=0, atol=1e-6)


def trained(folder: str) -> dict[str, torch.Tensor]:
    """Tables before and after three AdamW steps with weight decay, and the users' final vectors."""
    from distrec.training.engine import Engine
    from tests.methods.bare import run_config

    config = run_config(STAIR, train={"global_batch": 20}, optimizer={"name": "adamw", "lr": 0.01, "weight_decay": 0.3})
    engine = Engine(World.current(), Dataset.open(folder), config)
    whole = {}
    for moment in ("before", "after"):
        for name in ("user", "item"):
            block = engine.tables.block(name).detach()
            whole[f"{name} {moment}"] = engine.world.gather_blocks(block, engine.tables.partition(name)).clone()
        for step in range(3 if moment == "before" else 0):
            engine.train_step(0, step, engine.samples(0, step))
    final = engine.representations()
    return whole | {"final": engine.world.gather_blocks(final.users.contiguous(), engine.space.users).clone()}


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [1, 3])
def test_users_without_training_items_stay_at_zero_while_others_train(size: int, tmp_path: Path):
    for found in run_workers(trained, size, made(tmp_path)):
        assert all(value.isfinite().all() for value in found.values())
        assert not found["user after"][LONELY["users"]].any()
        assert not found["final"][LONELY["users"]].any()
        others = np.setdiff1d(np.arange(USERS), LONELY["users"])
        assert (found["user after"] != found["user before"])[others].any(1).all()
        assert (found["item after"] != found["item before"]).any(1).all(), "smoothing and decay change every item"
