"""A stand-in for rank 0 allocates what rank 0 of a real group allocates, for tables, dense modules and graphs."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from distrec.data.dataset import Dataset
from distrec.methods.registry import build_method
from distrec.parallel.partition import Partition
from distrec.parallel.world import World
from distrec.sizing.held import held
from distrec.sizing.standin import standing_in
from distrec.training.engine import Engine
from distrec.training.size import dense_values, worker_parts
from tests.distributed import run_workers
from tests.methods import bare

SIZE, USERS, ITEMS, WIDTH, TOKENS = 3, 40, 29, 12, 3
RUNS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"name": "lightgcn", "dim": 8}, {}),
    ({"name": "bprmf", "dim": 8}, {"optimizer": {"tables": "sparse"}}),
    ({"name": "alignrec", "dim": 8, "knn_k": 3}, {"dense": {"zero_stage": 1}}),
    ({"name": "mentor", "dim": 8}, {"dense": {"zero_stage": 2}}),
    ({"name": "stair", "dim": 4, "neighbours": [3, 1]}, {"optimizer": {"name": "adamw"}}),
    ({"name": "sasrec", "dim": 8}, {"dense": {"zero_stage": 3}}),
    ({"name": "odmt", "dim": 4, "id_dim": WIDTH, "length": 4}, {"optimizer": {"name": "sgd"}}),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    rng = np.random.default_rng(0)
    features = {name: rng.normal(size=(ITEMS, WIDTH)) for name in ("text", "image")}
    tokens = {f"{name}-tokens": rng.normal(size=(ITEMS, TOKENS, WIDTH)) for name in ("text", "image")}
    train = [(user, (user + shift) % ITEMS) for user in range(USERS) for shift in range(6)]
    return bare.write(tmp_path_factory.mktemp("data"), USERS, ITEMS, train, features, tokens=tokens)


def taken(data: str, standing: bool) -> list[dict[str, int]]:
    """What rank 0 holds in each of `RUNS` after two steps."""
    out = []
    opened = Dataset.open(data)
    for method, sections in RUNS:
        config = bare.run_config(method, data=data, train={"global_batch": 24}, **sections)
        engine = Engine(World.current(), opened, config)
        for step in range(2):
            if standing:
                assert all(np.isfinite(list(engine.train_step(0, step, engine.samples(0, step))[0].values())))
            else:
                engine.train_step(0, step, engine.samples(0, step))
        out.append(held(engine))
    return out


def stood_in(data: str) -> list[dict[str, int]]:
    dist.destroy_process_group()  # that of the helper, which ends one too
    try:
        with standing_in(SIZE):
            return taken(data, standing=True)
    finally:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.mark.multiprocess
def test_a_stand_in_holds_what_rank_0_holds(data: str) -> None:
    real, (alone,) = run_workers(taken, SIZE, data, False)[0], run_workers(stood_in, 1, data)
    lists = "lists of rows to exchange", "graphs"  # what others would ask for is made up
    for (method, sections), theirs, mine in zip(RUNS, real, alone, strict=True):
        same = {name: size for name, size in theirs.items() if name not in lists}
        assert {name: mine.get(name) for name in same} == same, method["name"]
        assert mine.keys() == theirs.keys()
        config = bare.run_config(method, data=data, **sections)
        opened = Dataset.open(data)
        built = build_method(config, opened)
        parts = worker_parts(config, opened, built, SIZE, dense_values(built))
        if config.optimizer.tables == "exact" and "tables" in theirs:
            assert parts["tables"] == theirs["tables"]
            copies = {"sgd": 0}.get(config.optimizer.name, 2)
            smoothed = 1 if method["name"] == "stair" else 0  # its optimizer also keeps the change of a step
            assert theirs.get("moments of tables", 0) >= copies * parts["tables"]
            assert theirs.get("moments of tables", 0) <= (copies + smoothed) * parts["tables"] + 64
        assert parts["interactions"] == theirs["interactions"] == 16 * 6 * USERS


def answers() -> None:
    dist.destroy_process_group()
    with standing_in(3) as group:
        world, rows = World.current(), Partition(5, 3)
        assert world == World(0, 3)
        mine = torch.tensor([[1.0], [2.0]])
        assert world.sum_(torch.ones(2)).tolist() == [1, 1]
        assert world.gather_blocks(mine, rows).flatten().tolist() == [1, 2, 1, 2, 1]
        assert world.reduce_blocks(torch.ones(5, 1), rows).shape == (2, 1)
        assert world.rows_from(2, mine, 0, 1).tolist() == [[0]]
        before = group.received
        # of what goes to others nothing comes back; they send what I send to myself
        assert world.all_to_all(torch.tensor([[7], [8], [9]]), [1, 2, 0], [1, 0, 2]).flatten().tolist() == [7, 7, 7]
        assert group.received - before == 2 * 8
    assert not dist.is_initialized()


@pytest.mark.multiprocess
def test_sizes_are_right_and_answers_are_made_of_my_own_rows() -> None:
    run_workers(answers_then_group, 1)


def answers_then_group() -> None:
    """`answers`, and a group again for the helper that ends this process."""
    answers()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
