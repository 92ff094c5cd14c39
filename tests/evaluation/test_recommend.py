"""Examples of recommendations against a plain sort, and the files that `distrec evaluate` writes next to its report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from distrec.data.dataset import Dataset, Interactions
from distrec.evaluation import Evaluator, chunks, ranking
from distrec.evaluation.chunks import Score
from distrec.evaluation.recommend import recommend, spread_users
from distrec.parallel.partition import Partition
from distrec.parallel.world import World
from tests.distributed import run_workers
from tests.evaluation.cases import KS, Case, inner, pairs, plain_rankings, random_case
from tests.training import small

SHAPES = [(1, 1, 1, 0), (7, 15, 30, 20), (40, 33, 200, 100), (601, 257, 700, 3000)]  # as Case takes them
HISTORY = 12


def best(interests: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """A scorer over several vectors per user."""
    return (interests @ items.t()).amax(1)


def recommended(case: Case, chosen: np.ndarray, score: Score = inner, k: int = 10) -> list[list[int]]:
    world = World.current()
    users, items = Partition(len(case.users), world.size), Partition(len(case.items), world.size)
    evaluator = Evaluator(world, users, items, case.held_out, case.masked, KS)
    blocks = (
        whole[side.start(world.rank) : side.stop(world.rank)]
        for whole, side in ((case.users, users), (case.items, items))
    )
    return recommend(evaluator, chosen, *blocks, score, k)


def check(seed: int, shape: tuple[int, int, int, int], kind: str) -> list[list[int]]:
    """Recommend to some users, in any order, and compare with a plain sort."""
    case = random_case(seed, *shape, kind)
    expected = list(plain_rankings(case, case.users @ case.items.T).values())
    chosen = np.random.default_rng(seed).permutation(len(expected))[:6]
    found = recommended(case, chosen)
    assert found == [expected[at][0][:10] for at in chosen]
    return found


@pytest.mark.parametrize("kind", ["ties", "exact"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", SHAPES)
def test_recommendations_are_those_of_a_plain_sort(shape, seed, kind):
    check(seed, shape, kind)


@pytest.mark.parametrize(("user_chunk", "item_chunk"), [(1, 1), (2, 7), (16, 33)])
def test_chunks_change_nothing(monkeypatch, user_chunk, item_chunk):
    monkeypatch.setattr(chunks, "USERS_PER_CHUNK", user_chunk)
    monkeypatch.setattr(ranking, "ITEMS_PER_CHUNK", item_chunk)
    for seed in range(4):
        check(seed, (40, 100, 150, 200), "ties")


def test_users_are_spread_over_activity():
    train = pairs(np.repeat(np.arange(20), np.arange(20)), np.zeros(190, np.int64))  # user n has n
    evaluated = np.arange(1, 20, 2)
    assert evaluated[spread_users(evaluated, train)].tolist() == [1, 5, 9, 11, 15, 19]
    equal = pairs(np.arange(20), np.zeros(20, np.int64))
    assert spread_users(np.arange(11), equal).tolist() == [0, 2, 4, 6, 8, 10], "ties in the order of users"
    for few in range(7):
        assert sorted(spread_users(evaluated[:few], train).tolist()) == list(range(few)), "all, where there are few"


def rows_of(data: Dataset, *splits: Any) -> list[Interactions]:
    return [data.interactions(split) for split in splits]


def test_evaluate_writes_users_and_examples(tmp_path: Path) -> None:
    """For every method with its own way of scoring, under every mask."""
    from distrec import train
    from distrec.training.evaluate import evaluate

    path = small.write_small(tmp_path / "data")
    data, shown = Dataset.open(path), set()
    for method, mask in (("popularity", "train"), ("bivrec", "train+valid"), ("odmt", "none"), ("lightgcn", "train")):
        config = small.write_config(
            tmp_path / "run.yaml", path, tmp_path / "runs", method,
            run={"name": method}, train={"epochs": 1}, evaluate={"mask": mask},
        )  # fmt: skip
        train(config)
        run = tmp_path / "runs" / method
        for split in ("valid", "test"):
            report = evaluate(str(run), split)
            table = pq.read_table(run / f"evaluation/{split}-users.parquet")
            assert str(table.schema.field("user").type) == "int64"
            users = table["user"].to_pylist()
            assert users == sorted({*data.interactions(split).user.tolist()})
            assert table["id"].to_pylist() == [f"u{user}" for user in users]
            assert set(table.column_names) == {"user", "id", *report["metrics"]}
            about = json.loads(table.schema.metadata[b"distrec"])
            assert report.items() >= about.items() >= {"split": split, "mask": mask, "users": len(users)}.items()
            for name, value in report["metrics"].items():
                assert str(table.schema.field(name).type) == "double"
                assert table[name].to_numpy().mean() == value
            written = small.read(run, f"evaluation/{split}-examples.json")
            assert written["about"] == about
            told = written["users"]
            shown.add((split, tuple(user["user"] for user in told)))
            assert len(told) == 6
            for user in map(numbers, told):
                check_example(user, data, split, mask)
                hit = bool(set(user["held_out"]) & set(user["recommended"]))
                assert hit == table["hit@10"][users.index(user["user"])].as_py(), "the ranking that was measured"
    assert len(shown) == 2, "the same users in every run"


def numbers(user: dict[str, Any]) -> dict[str, Any]:
    """A user of an examples file with its items as numbers, after a look at their ids and titles."""
    items = {key: user[key] for key in ("history", "held_out", "recommended")}
    for item in (item for listed in items.values() for item in listed):
        assert item == {"item": item["item"], "id": f"i{item['item']}", "title": f"title {item['item']}"}
    return {**user, **{key: [item["item"] for item in listed] for key, listed in items.items()}}


def check_example(user: dict[str, Any], data: Dataset, split: str, mask: str) -> None:
    number = user["user"]
    assert set(user) == {"user", "id", "history", "held_out", "recommended"}
    assert user["id"] == f"u{number}"
    earlier = rows_of(data, *(["train"] if split == "valid" else ["train", "valid"]))
    had = [
        (time, item)
        for rows in earlier
        for owner, item, time in zip(rows.user, rows.item, rows.timestamp)
        if owner == number
    ]
    assert user["history"] == [item for _, item in sorted(had, key=lambda pair: pair[0])][-HISTORY:]
    (held_out,) = rows_of(data, split)  # type: ignore[misc]
    assert user["held_out"] == sorted(held_out.item[held_out.user == number].tolist())
    assert len(user["recommended"]) == len(set(user["recommended"])) == 10
    hidden = {"none": [], "train": ["train"], "train+valid": ["train", "valid"] if split == "test" else ["train"]}[mask]
    assert not {*user["recommended"]} & {
        item for rows in rows_of(data, *hidden) for item in rows.item[rows.user == number]
    }


def everything(data: str, storage: str) -> list[list[list[int]]]:
    """Every shape and kind, including rounded products, and a scorer over several vectors; then the files of a run."""
    from distrec.config import RunConfig, decode
    from distrec.methods.registry import resolve
    from distrec.runtime import quiet
    from distrec.training.evaluate import evaluate_worker

    found = [check(seed, shape, kind) for seed, shape in enumerate(SHAPES) for kind in ("ties", "exact")]
    whole, ranking.ITEMS_PER_CHUNK = ranking.ITEMS_PER_CHUNK, 100
    try:
        case = random_case(5, 300, 257, 700, 900, "rounded", dim=24)
        chosen = np.arange(0, 60, 10)
        found.append(recommended(case, chosen))
        case.users = case.users.unflatten(1, (3, 8))
        case.items = case.items[:, :8].contiguous()
        found.append(recommended(case, chosen, best))
    finally:
        ranking.ITEMS_PER_CHUNK = whole
    quiet()
    tree = {"data": data, "run": {"name": "r", "storage": storage}, "method": {"name": "popularity"}}
    evaluate_worker(resolve(decode(RunConfig, tree)), f"{storage}/r", "test")
    return found


@pytest.mark.multiprocess
def test_the_result_is_the_same_at_any_number_of_workers(tmp_path: Path) -> None:
    from distrec import train

    path, storage = small.write_small(tmp_path / "data"), tmp_path / "runs"
    train(small.write_config(tmp_path / "run.yaml", path, storage, "popularity", run={"name": "r"}))
    files, lists = [], []
    for size in (1, 2, 3):
        if size == 1:
            lists.append(everything(path, str(storage)))
        else:
            lists += run_workers(everything, size, path, str(storage))
        files.append({file.name: file.read_bytes() for file in (storage / "r/evaluation").iterdir()})
        shutil.rmtree(storage / "r/evaluation")
    assert all(found == lists[0] for found in lists)
    assert files[0].keys() == {"test.json", "test-users.parquet", "test-examples.json"}
    assert files[0] == files[1] == files[2]
