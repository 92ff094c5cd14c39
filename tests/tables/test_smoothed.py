"""Tables with smoothed updates in 1 to 3 processes, against plain optimizers and docs/methods/stair.md section 3.6."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from distrec.config.run import OptimizerSection
from distrec.parallel.partition import Partition
from distrec.parallel.world import World
from distrec.runtime import quiet
from distrec.tables.spec import Table
from tests.distributed import run_workers

ITEMS, USERS, DIM, STEPS = 7, 5, 4, 6  # with 3 workers the blocks of 5 and 7 rows are unequal
RULES: list[dict[str, Any]] = [
    {"name": "adamw", "lr": 1e-2, "weight_decay": 0.3},
    {"name": "adamw", "lr": 1e-2, "betas": [0.5, 0.9], "eps": 1e-2},
    {"name": "adam", "lr": 1e-2, "weight_decay": 0.1},
    {"name": "sgd", "lr": 0.3},
    {"name": "sgd", "lr": 0.3, "weight_decay": 0.1},
]
Map = Callable[[torch.Tensor], torch.Tensor]


def operator() -> torch.Tensor:
    """A linear map of items, `[items, items]` float64, not symmetric and with negative entries."""
    return torch.from_numpy(np.random.default_rng(5).normal(size=(ITEMS, ITEMS)) / 2)


def initial(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).normal(size=(rows, DIM)).astype(np.float32)


def gradients() -> Iterator[dict[str, torch.Tensor]]:
    """The whole gradients of each step. Their entries differ much in size, so that Adam's division matters."""
    rng = np.random.default_rng(2)
    for _ in range(STEPS):
        sizes = {"item": (ITEMS, DIM), "same": (ITEMS, DIM), "user": (USERS, DIM)}
        yield {
            name: torch.from_numpy((rng.normal(size=shape) * 10 ** rng.uniform(-2, 1, shape)).astype(np.float32))
            for name, shape in sizes.items()
        }


def made(world: World, optimizer: dict[str, Any]) -> Any:
    """Three tables: `item` is smoothed by the operator, `same` by the identity, and `user` is not smoothed."""
    from distrec.tables.sharded import ShardedTables

    items, users = Partition(ITEMS, world.size), Partition(USERS, world.size)
    mine = operator()[items.start(world.rank) : items.stop(world.rank)].float()

    def smooth(direction: torch.Tensor) -> torch.Tensor:
        return mine @ world.gather_blocks(direction, items)

    def rows(count: int) -> Any:
        return lambda key, rows, dim, start, stop: initial(count)[start:stop]

    specs = [
        Table("item", "item", DIM, rows(ITEMS), smooth=smooth),
        Table("user", "user", DIM, rows(USERS)),
        Table("same", "item", DIM, rows(ITEMS), smooth=lambda direction: direction),
    ]
    return ShardedTables(world, specs, {"user": users, "item": items}, OptimizerSection(**optimizer), seed=0)


def trained(optimizer: dict[str, Any]) -> dict[str, list[torch.Tensor]]:
    """The whole tables after each step. Half-way through, a second instance continues from the first one's state."""
    world = World.current()
    tables = made(world, optimizer)
    out: dict[str, list[torch.Tensor]] = {name: [] for name in ("item", "user", "same")}
    for step, grads in enumerate(gradients()):
        if step == STEPS // 2:
            again = made(world, optimizer)
            for name, tensor in tables.state().items():
                again.state()[name].to_local().copy_(tensor.to_local())
            again.steps, tables = tables.steps, again
        for name, grad in grads.items():
            partition = tables.partition(name)
            tables.block(name).grad = grad[partition.start(world.rank) : partition.stop(world.rank)] * world.size
        tables.average_gradients()
        tables.step(optimizer["lr"] * 0.9**step)
        assert tables.steps == (0 if optimizer["name"] == "sgd" else step + 1)
        for name, history in out.items():
            assert tables.block(name).grad is None
            history.append(world.gather_blocks(tables.block(name).detach(), tables.partition(name)).clone())
    return out


def everything() -> list[dict[str, list[torch.Tensor]]]:
    quiet()
    return [trained(rule) for rule in RULES]


def by_library(optimizer: dict[str, Any], name: str, rows: int) -> list[torch.Tensor]:
    """The table after each step of PyTorch's optimizer in float64."""
    weight = torch.from_numpy(initial(rows)).double().requires_grad_()
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    options = {key: value for key, value in ({"weight_decay": 0.0} | optimizer).items() if key != "name"}
    rule = kinds[optimizer["name"]]([weight], **options)
    history = []
    for step, grads in enumerate(gradients()):
        weight.grad = grads[name].double()
        rule.param_groups[0]["lr"] = optimizer["lr"] * 0.9**step
        rule.step()
        history.append(weight.detach().clone())
    return history


def by_specification(optimizer: dict[str, Any], before: Map, after: Map, decay: Map) -> list[torch.Tensor]:
    """The table after each step of docs/methods/stair.md section 3.6, in float64.

    The three maps are applied to the gradient, to the direction and to the weight decay.
    """
    weight = torch.from_numpy(initial(ITEMS)).double()
    first, second = optimizer.get("betas", [0.9, 0.999])
    eps, rate = optimizer.get("eps", 1e-8), optimizer.get("weight_decay", 0.0)
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    history = []
    for step, grads in enumerate(gradients()):
        lr, t, g = optimizer["lr"] * 0.9**step, step + 1, before(grads["item"].double())
        if optimizer["name"] == "adamw":
            weight = weight - lr * rate * decay(weight)
        else:
            g = g + rate * weight
        m, v = first * m + (1 - first) * g, second * v + (1 - second) * g * g
        adam = (m / (1 - first**t)) / (v.sqrt() / (1 - second**t) ** 0.5 + eps)
        weight = weight - lr * after(g if optimizer["name"] == "sgd" else adam)
        history.append(weight)
    return history


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


def smoothing(x: torch.Tensor) -> torch.Tensor:
    return operator() @ x


def gap(one: list[torch.Tensor], other: list[torch.Tensor]) -> list[float]:
    """The largest difference after each step, relative to the table's largest change so far."""
    start = torch.from_numpy(initial(len(one[0]))).double()
    return [float((a - b).abs().max() / (b - start).abs().max()) for a, b in zip(one, other, strict=True)]


@pytest.fixture(scope="module", params=[1, 2, 3])
def found(request: pytest.FixtureRequest) -> list[dict[str, list[torch.Tensor]]]:
    ranks = run_workers(everything, request.param, timeout=400)
    for rank in ranks[1:]:
        for one, other in zip(ranks[0], rank, strict=True):
            assert all(torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True))
    first: list[dict[str, list[torch.Tensor]]] = ranks[0]
    return first


@pytest.mark.multiprocess
@pytest.mark.parametrize("rule", range(len(RULES)))
def test_with_the_identity_it_is_the_plain_optimizer(found, rule: int):
    assert max(gap(found[rule]["same"], by_library(RULES[rule], "same", ITEMS))) < 2e-5
    assert max(gap(found[rule]["user"], by_library(RULES[rule], "user", USERS))) < 2e-5, "the plain table"


@pytest.mark.multiprocess
@pytest.mark.parametrize("rule", range(len(RULES)))
def test_the_final_direction_is_smoothed_and_the_decay_is_not(found, rule: int):
    wanted = by_specification(RULES[rule], identity, smoothing, identity)
    assert max(gap(found[rule]["item"], wanted)) < 2e-5


@pytest.mark.parametrize("rule", range(len(RULES)))
def test_the_formulas_of_the_page_without_maps_are_the_plain_optimizer(rule: int):
    assert (
        max(gap(by_specification(RULES[rule], identity, identity, identity), by_library(RULES[rule], "item", ITEMS)))
        < 1e-9
    )


@pytest.mark.multiprocess
@pytest.mark.parametrize("rule", range(len(RULES)))
def test_another_order_is_another_algorithm(found, rule: int):
    """Smoothing the gradient, or the decay too, gives a very different table from the first step on.

    SGD without decay is an exception: its direction is the gradient, so both orders are the same.
    """
    item, name, decays = found[rule]["item"], RULES[rule]["name"], "weight_decay" in RULES[rule]
    gradient_first = gap(item, by_specification(RULES[rule], smoothing, identity, identity))
    if name == "sgd" and not decays:
        assert max(gradient_first) < 2e-5
    else:
        assert min(gradient_first) > (0.1 if name != "sgd" else 0.01)
    if name == "adamw" and decays:
        assert min(gap(item, by_specification(RULES[rule], identity, smoothing, smoothing))) > 0.01
    assert min(gap(item, by_specification(RULES[rule], identity, identity, identity))) > 0.1, (
        "the table is not smoothed"
    )
