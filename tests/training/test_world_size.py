"""Promise 1 of docs/design.md: workers, sharding and ZeRO stage change speed and memory, never the trajectory."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distrec.config import RunConfig, decode
from distrec.data.dataset import Dataset
from distrec.methods.registry import resolve
from distrec.parallel.world import World
from distrec.runtime import quiet
from tests.distributed import run_workers
from tests.oracle.gather import table_weights
from tests.training.random_data import write_random

STEPS, BATCH = 20, 50
# Users, items, training rows, seed. An epoch of 7, 3 or 5 steps ends with a batch of 2, 1 or 3 rows: with 4 workers some
# have none. Neither counts nor batches divide by the numbers of workers; 9 users on 4 workers leave the last one none.
DATASETS = {"more users": (61, 23, 302, 0), "more items": (17, 90, 101, 1), "few users": (9, 31, 203, 2)}
ADAM, SGD = {"name": "adam", "lr": 2e-3}, {"name": "sgd", "lr": 0.05}
ADAMW = {"name": "adamw", "lr": 2e-3, "weight_decay": 0.1, "lr_decay": {"factor": 0.5, "epochs": 1.5}}
CLIPPED = ADAMW | {"clip_norm": 5.0}
ALIGNREC: dict[str, Any] = {"name": "alignrec", "dim": 8, "knn_k": 5, "sim_weight": 0.3, "cl_loss": 0.1}
LIGHTGCN: dict[str, Any] = {"name": "lightgcn", "dim": 8, "layers": 2, "reg": 0.01}
BPRMF: dict[str, Any] = {"name": "bprmf", "dim": 8, "reg": 0.01}
STAIR: dict[str, Any] = {"name": "stair", "dim": 5, "neighbours": [5, 1]}
STAIR_TEXT: dict[str, Any] = {"name": "stair", "dim": 8, "features": ["text"], "neighbours": [3], "layers": 2}
MENTOR: dict[str, Any] = {"name": "mentor", "dim": 8, "knn_k": 4, "mask_weight_g": 0.1}
SASREC: dict[str, Any] = {"name": "sasrec", "dim": 8, "length": 6, "dropout": 0.0}
ODMT: dict[str, Any] = {"name": "odmt", "dim": 8, "id_dim": 6, "length": 5, "dropout": 0.0, "alpha": 3, "init": 0}
BIVREC: dict[str, Any] = {"name": "bivrec", "dim": 8, "length": 6, "dropout": 0.0, "interests": 3}
PROTOTYPE = BIVREC | {"level": "prototype", "modality": "both"}
POSITION = BIVREC | {
    "gaussian": "position",
    "allocation": "aligned",
    "gumbel": "close",
    "rank_by": "both",
    "mm_type": "sum",
}
# Without noise, tokens that start at zero leave the assignment to rounding: all interests are equally near.
CLOSE = PROTOTYPE | {"gumbel": "close", "nce": "intended", "zero_tokens": False}
GENTLE = {"name": "sgd", "lr": 1e-3}  # the contrast's first gradients are large: its vectors lie near zero
UNPERTURBED = MENTOR | {"mask_weight_g": 0.0, "item_layers": 2}
INTENT = MENTOR | {"variant": "intent"}


def title(method: dict[str, Any]) -> str:
    return " ".join([method["name"], *(method[key] for key in ("variant", "level", "gaussian") if key in method)])


# Three workers train every other run: each method's are on both sides of that line.
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    f"{title(method)}, {optimizer['name']}, {data}": (data, method, optimizer, seed)
    for seed, (data, method, optimizer) in enumerate(
        [(data, method, ADAM) for data in DATASETS for method in (ALIGNREC, LIGHTGCN, BPRMF)]
        + [("more users", ALIGNREC, SGD), ("more items", ALIGNREC, SGD), ("more items", LIGHTGCN, SGD)]
        + [("few users", LIGHTGCN, SGD), ("more users", BPRMF, SGD), ("more users", ALIGNREC, ADAMW)]
        + [("few users", STAIR_TEXT, ADAM), ("more users", STAIR, ADAMW), ("more items", STAIR, SGD | {"lr": 2.0})]
        + [("more users", MENTOR, ADAM), ("more items", UNPERTURBED, ADAM), ("few users", MENTOR, ADAM)]
        + [("more items", INTENT, SGD), ("more users", INTENT, ADAM)]
        + [("more users", SASREC, ADAM), ("more items", SASREC, SGD), ("few users", SASREC, ADAMW)]
        + [("more users", ODMT, CLIPPED), ("more items", ODMT | {"init": 1, "version": "v3"}, SGD)]
        + [("few users", ODMT | {"init": 3, "tie_cls_feature": True, "dedupe": False}, ADAM)]
        + [("more users", BIVREC, ADAM), ("more users", PROTOTYPE, ADAM), ("few users", PROTOTYPE, ADAMW)]
        + [("few users", BIVREC, ADAMW), ("more items", CLOSE, ADAM), ("more items", POSITION, GENTLE)]
    )
}
SPARSE = "bprmf, sparse tables"
RUNS[SPARSE] = ("more users", BPRMF, {"tables": "sparse", "lr": 0.05}, 50)
RUNS["odmt, sparse tables"] = ("more users", ODMT | {"id_dim": 8}, {"tables": "sparse", "lr": 2e-3}, 51)
ZERO = ["alignrec, adam, more users", "alignrec, adamw, more users", "alignrec, sgd, more items"]
ZERO += ["mentor, adam, more users", "mentor intent, adam, more users", "sasrec, adam, more users"]
ZERO += ["odmt, adamw, more users"]
ZERO += ["bivrec, adam, more users", "bivrec prototype, adam, more users"]

Result = dict[str, Any]


def train(folder: str, name: str, stage: int) -> Result:
    """Twenty steps: terms of each, then whole tables, dense weights and metrics."""
    from distrec.training.engine import Engine
    from distrec.training.loop import build_evaluator

    data_name, method, optimizer, seed = RUNS[name]
    tree = {
        "data": folder, "run": {"name": "r"}, "method": method, "optimizer": optimizer, "dense": {"zero_stage": stage},
        "train": {"global_batch": BATCH, "seed": seed},
    }  # fmt: skip
    config = resolve(decode(RunConfig, tree))
    engine = Engine(World.current(), Dataset.open(str(Path(folder, data_name))), config)
    terms = []
    for count in range(STEPS):
        epoch, step = divmod(count, engine.steps_per_epoch)
        engine.set_lr(config.optimizer.lr_at(epoch))
        share, values, _ = engine.forward(engine.batch(epoch, step, engine.samples(epoch, step)))
        engine.update(share)
        terms.append(values)
    metrics = {}
    for split in ("valid", "test"):
        evaluator = build_evaluator(engine, split, engine.space.data.interactions(split), config)
        final = engine.representations()
        ranked = evaluator.rank(final.users, final.items, engine.method.score)
        metrics |= {f"{split} {key}": value for key, value in ranked.metrics().items()}
    tables = table_weights(engine, {table: table for table in engine.tables.specs})
    dense = {key: value.numpy() for key, value in engine.dense.state().items() if key.endswith(".weight")}
    full = [(count + 1) % engine.steps_per_epoch != 0 or engine.steps_per_epoch == 1 for count in range(STEPS)]
    return {"terms": terms, "full": full, "tables": tables, "dense": dense, "metrics": metrics}


def train_all(folder: str, runs: list[tuple[str, int]]) -> list[Result]:
    quiet()
    results = [train(folder, name, stage) for name, stage in runs]
    return results if World.current().rank == 0 else []


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory):
    """Results of all runs with some number of workers, by (run, ZeRO stage); each number of workers starts once."""
    folder = tmp_path_factory.mktemp("data")
    for name, shape in DATASETS.items():
        write_random(folder / name, *shape)

    @cache
    def made(size: int) -> dict[tuple[str, int], Result]:
        # Three workers repeat a part: the whole list with 1, 2 and 4 costs enough.
        runs = [(name, 0) for number, name in enumerate(RUNS) if size != 3 or number % 2 == 0]
        runs += [(name, stage) for name in ZERO for stage in (1, 2, 3) if size == 2]
        return dict(zip(runs, run_workers(train_all, size, str(folder), runs, timeout=500)[0], strict=True))

    return made


def agree(found: Result, wanted: Result, name: str) -> None:
    data, _, optimizer, _ = RUNS[name]
    for step, (ours, theirs) in enumerate(zip(found["terms"], wanted["terms"], strict=True)):
        assert ours.keys() == theirs.keys()
        assert sum(ours.values()) == pytest.approx(sum(theirs.values()), rel=1e-5), f"loss of step {step}"
        for term, value in ours.items():
            assert value == pytest.approx(theirs[term], rel=1e-5, abs=1e-6), f"{term} of step {step}"
    for kind in ("tables", "dense"):
        assert found[kind].keys() == wanted[kind].keys()
        for key, value in found[kind].items():
            difference = np.abs(value - wanted[kind][key]).ravel()
            assert np.quantile(difference, 0.999, method="lower") <= 1e-4, f"{kind} {key}"
            assert difference.max() <= optimizer["lr"] * STEPS, f"{kind} {key}"
    users = DATASETS[data][0]
    for key, value in found["metrics"].items():
        assert value == pytest.approx(wanted["metrics"][key], abs=2 / users), key


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_workers_gives_the_same_trajectory(results, size: int):
    alone = results(1)
    for (name, stage), result in results(size).items():
        if stage == 0:
            agree(result, alone[name, 0], name)


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_any_zero_stage_gives_the_same_trajectory(results, stage: int):
    for name in ZERO:
        agree(results(2)[name, stage], results(1)[name, 0], name)


@pytest.mark.multiprocess
def test_the_runs_do_train_and_differ(results):
    """The comparison means something: losses fall, weights move, and other seeds, methods and optimizers differ."""
    alone = results(1)
    for (name, _), result in alone.items():
        main = next(term for term in ("bpr", "ce", "ce_id") if term in result["terms"][0])
        full = [terms[main] for terms, whole in zip(result["terms"], result["full"], strict=True) if whole]
        assert np.mean(full[-3:]) < np.mean(full[:3]), name
    tables = [b"".join(table.tobytes() for table in result["tables"].values()) for result in alone.values()]
    assert len(set(tables)) == len(tables)
    with pytest.raises(AssertionError):
        agree(
            alone["lightgcn, adam, more items", 0], alone["lightgcn, sgd, more items", 0], "lightgcn, adam, more items"
        )
