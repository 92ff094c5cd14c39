"""Sharded tables against plain PyTorch on whole tensors, in 1 to 3 processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distrec.errors import InputError
from distrec.parallel.world import World
from distrec.runtime import quiet
from distrec.tables.spec import xavier_uniform
from tests.distributed import run_workers
from tests.tables import feature_blocks
from tests.tables.small_tables import ITEMS, SEED, USERS, WIDTH, given_rows, tables

EXACT: list[dict[str, Any]] = [
    {"name": "adam", "lr": 1e-2},
    {"name": "adam", "lr": 1e-2, "betas": [0.5, 0.9], "eps": 1e-3, "weight_decay": 0.1},
    {"name": "adamw", "lr": 1e-2, "weight_decay": 0.3},
    {"name": "sgd", "lr": 0.5},
    {"name": "sgd", "lr": 0.5, "weight_decay": 0.1},
]


def whole(sharded: Any, name: str) -> torch.Tensor:
    block = sharded.block(name).detach()
    return sharded.world.gather_blocks(block, sharded.partition(name)).clone()


def initial(kind: str) -> dict[str, torch.Tensor]:
    """The initial values of every table, each as a whole tensor."""
    items = ITEMS[kind]
    return {
        "user": torch.from_numpy(xavier_uniform(("table", "user", SEED), USERS, WIDTH, 0, USERS)),
        "item": torch.from_numpy(xavier_uniform(("table", "item", SEED), items, WIDTH, 0, items)),
        "given": torch.from_numpy(given_rows(items)),
    }


def starts(world: World) -> None:
    from distrec.tables import sharded as module

    for optimizer in ({"name": "adam"}, {"tables": "sparse"}):
        for piece in (module._INIT_ROWS, 2):
            before, module._INIT_ROWS = module._INIT_ROWS, piece
            made = tables(world, optimizer)
            module._INIT_ROWS = before
            for name, wanted in initial(optimizer.get("tables", "exact")).items():
                assert torch.equal(whole(made, name), wanted)
                assert len(made.block(name)) == made.partition(name).count(world.rank)


def exact(world: World) -> None:
    """Take six steps with a changing learning rate.

    My rows get the gradients that the backward pass leaves: the world size times the whole gradient.
    """
    rules = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    for optimizer in EXACT:
        made = tables(world, optimizer)
        plain = {name: value.requires_grad_() for name, value in initial("exact").items()}
        options = {name: value for name, value in optimizer.items() if name != "name"}
        rule = rules[optimizer["name"]](plain.values(), foreach=False, **options)
        generator = torch.Generator().manual_seed(2)
        for step in range(6):
            if step == 3:
                made = restored(world, made, optimizer)
            lr = optimizer["lr"] * 0.9**step
            for name, tensor in plain.items():
                if name == "given" and optimizer["name"] == "adamw":
                    continue  # a table without gradient does not change, even with weight decay
                tensor.grad = torch.randn(tensor.shape, generator=generator) * 10.0 ** (-step)
                partition = made.partition(name)
                rows = slice(partition.start(world.rank), partition.stop(world.rank))
                made.block(name).grad = tensor.grad[rows] * world.size
            for group in rule.param_groups:
                group["lr"] = lr
            rule.step()
            rule.zero_grad()
            made.average_gradients()
            made.step(lr)
            for name, tensor in plain.items():
                torch.testing.assert_close(whole(made, name), tensor.detach(), rtol=1e-5, atol=1e-6)
                assert made.block(name).grad is None
            assert made.steps == (0 if optimizer["name"] == "sgd" else step + 1)


def restored(world: World, made: Any, optimizer: dict[str, Any]) -> Any:
    """Another instance with the state of `made`."""
    again = tables(world, optimizer)
    source, target = made.state(), again.state()
    assert source.keys() == target.keys()
    for name, tensor in source.items():
        kind = name.split(".")[1]
        assert kind in ("weight", "exp_avg", "exp_avg_sq", "sum_of_squares")
        full = tensor.full_tensor()
        assert full.shape[0] == made.partition(name.split(".")[0]).total
        if kind == "weight":
            assert torch.equal(full, whole(made, name.split(".")[0]))
        target[name].to_local().copy_(tensor.to_local())
    again.steps = made.steps
    return again


def row_wise_adagrad(
    table: torch.Tensor, squares: torch.Tensor, ids: torch.Tensor, grads: torch.Tensor, lr: float, eps: float
) -> None:
    """Row-wise Adagrad written plainly: `squares` sums the mean square gradient of each row.

    A row's gradients are added up first. Its step is divided by the root of its sum.
    """
    for row in ids.unique().tolist():
        grad = grads[ids == row].sum(0)
        squares[row] += grad.square().mean()
        table[row] -= lr * grad / (squares[row].sqrt() + eps)


def sparse(world: World) -> None:
    optimizer = {"tables": "sparse", "lr": 0.3, "eps": 1e-6}
    if world.size > 1:
        with pytest.raises(InputError, match=f"has {world.size - 1} rows, too few for .* on {world.size} workers"):
            tables(world, optimizer, items=world.size - 1)
    made = tables(world, optimizer)
    plain = initial("sparse")
    squares = {name: torch.zeros(len(value)) for name, value in plain.items()}
    generator = torch.Generator().manual_seed(4)
    for step in range(5):
        lr = 0.3 if step < 2 else 0.05
        if step == 3:
            made = restored(world, made, optimizer)
        made.set_sparse_lr(lr)
        assert torch.equal(whole(made, "user"), plain["user"]) or step, "setting the learning rate changes a row"
        for name, count in (("user", USERS - 3), ("item", ITEMS["sparse"])):  # the last users are never looked up
            ids_of = [
                torch.randint(count, (0 if rank == step % 4 else 6,), generator=generator) for rank in range(world.size)
            ]
            grads_of = [torch.randn(len(ids), WIDTH, generator=generator) for ids in ids_of]
            rows = made.lookup(name, ids_of[world.rank])
            torch.testing.assert_close(rows.detach(), plain[name][ids_of[world.rank]])
            ((rows * grads_of[world.rank]).sum() * world.size).backward()
            row_wise_adagrad(plain[name], squares[name], torch.cat(ids_of), torch.cat(grads_of), lr, 1e-6)
            with pytest.raises(RuntimeError, match=f"'{name}' is looked up twice"):
                made.lookup(name, ids_of[world.rank])
        made.step(lr)
        for name, value in plain.items():
            torch.testing.assert_close(whole(made, name), value, rtol=1e-5, atol=1e-6)
        assert torch.equal(whole(made, "user")[-3:], initial("sparse")["user"][-3:]), "rows outside the batch changed"
    state = made.state()
    block = state["user.sum_of_squares"].to_local().flatten()
    partition = made.partition("user")
    torch.testing.assert_close(block, squares["user"][partition.start(world.rank) : partition.stop(world.rank)])


def everything(features: str) -> None:
    quiet()
    world = World.current()
    feature_blocks.check(features)
    starts(world)
    exact(world)
    sparse(world)


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [1, 2, 3])
def test_tables_equal_plain_tensors(size: int, tmp_path: Path):
    feature_blocks.write(tmp_path)
    run_workers(everything, size, str(tmp_path), timeout=400)
