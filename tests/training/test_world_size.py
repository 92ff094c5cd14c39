"""Promise 1 of docs/design.md under every optimizer and ZeRO stage, and that its check can fail.

`tests/methods/test_every_method.py` compares numbers of workers for every method.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from distrec.parallel.world import World
from distrec.runtime import quiet
from tests.distributed import run_workers
from tests.methods import beside
from tests.training.random_data import write_random
from tests.training.trajectory import (
    ADAM,
    DATASETS,
    KS,
    Result,
    Run,
    Tolerance,
    agree,
    config_of,
    engine_of,
    train,
)

SGD = {"name": "sgd", "lr": 0.05}
ADAMW = {"name": "adamw", "lr": 2e-3, "weight_decay": 0.1, "lr_decay": {"factor": 0.5, "epochs": 1.5}}
CLIPPED = ADAMW | {"clip_norm": 5.0}
POSITION = {"gaussian": "position", "allocation": "aligned", "gumbel": "close", "rank_by": "both", "mm_type": "sum"}
# Without noise, tokens that start at zero are equally near to all interests, so rounding would decide the assignment.
CLOSE = {"level": "prototype", "modality": "both", "gumbel": "close", "nce": "intended", "zero_tokens": False}
GENTLE = {"name": "sgd", "lr": 1e-3}  # the contrast's first gradients are large, since its vectors are near zero


def run(data: str, name: str, optimizer: dict[str, Any], seed: int, **more: Any) -> Run:
    """A run with a method's small settings; `more` are other settings of the method."""
    method, bounds = beside.steady(beside.settings(name)) | more, beside.small(name).tolerance
    return Run(data, method, optimizer, seed, tolerance=Tolerance(**bounds))


# Those that `make test` trains, and what each of them covers.
DEFAULT: dict[str, Run] = {
    "alignrec, adam": run("more users", "alignrec", ADAM, 0),  # with ZeRO: one small module
    "lightgcn, adam": run("more items", "lightgcn", ADAM, 1),
    "bprmf, sgd": run("more users", "bprmf", SGD, 2),
    "stair, adamw": run("more users", "stair", ADAMW, 4),  # smoothed updates under a falling learning rate
    "odmt, clipped": run("more users", "odmt", CLIPPED, 5),  # with ZeRO: clipping over partitions
    "sasrec, small batches": replace(run("few users", "sasrec", CLIPPED, 7), batch=4),
    "bivrec, adam": run("more users", "bivrec", ADAM, 29),  # with ZeRO: a module whose inputs depend on other tables
    "bivrec position, sgd": run("more items", "bivrec", GENTLE, 34, **POSITION),  # assignments without noise
}
# Those that only `make test-all` trains: more methods under other optimizers, and on other data.
WIDE: dict[str, Run] = {
    "alignrec, sgd": run("more items", "alignrec", SGD, 10),
    "alignrec, adamw": run("more users", "alignrec", ADAMW, 11),
    "lightgcn, sgd": run("few users", "lightgcn", SGD, 12),
    "bprmf, adam": run("few users", "bprmf", ADAM, 13),
    "stair, sgd": run("more items", "stair", SGD | {"lr": 2.0}, 14),
    "mentor, adam": run("few users", "mentor", ADAM, 15),
    "mentor intent, adam": run("more users", "mentor", ADAM, 16, variant="intent"),
    "mentor intent, sgd": run("more items", "mentor", SGD, 17, variant="intent"),
    "sasrec, sgd": run("more items", "sasrec", SGD, 18),
    "sasrec, adamw": run("few users", "sasrec", ADAMW, 19),
    "odmt, sgd": run("more items", "odmt", SGD, 20, init=1, id_dim=6, version="v3"),
    "bivrec, adamw": run("few users", "bivrec", ADAMW, 32),
    "bivrec prototype, adam": run("more users", "bivrec", ADAM, 30, level="prototype", modality="both"),
    # Without noise, more of these scores are close, so a few elements may differ more.
    "bivrec close, adam": replace(
        run("more items", "bivrec", ADAM, 33, **CLOSE), tolerance=Tolerance(0.1, 2.0, most=0.05)
    ),
}
RUNS = DEFAULT | WIDE
ZERO_DEFAULT = ["alignrec, adam", "odmt, clipped", "bivrec, adam"]
ZERO = ["alignrec, sgd", "alignrec, adamw", "mentor, adam", "mentor intent, adam", "sasrec, adamw"]
ZERO += ["bivrec prototype, adam"]


def train_all(folder: str, runs: list[tuple[str, int]]) -> list[Result]:
    quiet()
    results = [train(engine_of(config_of(folder, RUNS[name], stage))) for name, stage in runs]
    return results if World.current().rank == 0 else []


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Results by (run, ZeRO stage) of the selected tests' runs; each number of workers is started only once."""
    folder = tmp_path_factory.mktemp("data")
    for name, shape in DATASETS.items():
        write_random(folder / name, *shape)
    here = [item for item in request.session.items if item.path == request.path]
    chosen = [item.callspec.params for item in here if hasattr(item, "callspec")]

    @cache
    def made(size: int) -> dict[tuple[str, int], Result]:
        if size == 1:  # all other results are compared with these
            needed = [(it["name"], 0) for it in chosen]
        else:
            sizes = [it.get("size", 2 if "stage" in it else 1) for it in chosen]
            needed = [(it["name"], it.get("stage", 0)) for it, own in zip(chosen, sizes, strict=True) if own == size]
        runs = list(dict.fromkeys(needed))
        return dict(zip(runs, run_workers(train_all, size, str(folder), runs, timeout=500)[0], strict=True))

    return made


def runs_of(default: Any, wide: Any) -> Any:
    return [*default, *(pytest.param(name, marks=pytest.mark.wide) for name in wide)]


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [2, 3, pytest.param(4, marks=pytest.mark.wide)])
@pytest.mark.parametrize("name", runs_of(DEFAULT, WIDE))
def test_any_number_of_workers_gives_the_same_trajectory(results, name: str, size: int):
    agree(results(size)[name, 0], results(1)[name, 0], RUNS[name])


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", runs_of(ZERO_DEFAULT, ZERO))
def test_any_zero_stage_gives_the_same_trajectory(results, name: str, stage: int):
    agree(results(2)[name, stage], results(1)[name, 0], RUNS[name])


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", runs_of(DEFAULT, WIDE))
def test_a_run_does_train(results, name: str):
    """The loss falls and every weight changes. Otherwise the comparison would prove nothing."""
    result = results(1)[name, 0]
    main = [next(iter(terms.values())) for terms, full in zip(result["terms"], result["full"], strict=True) if full]
    assert np.mean(main[-3:]) < np.mean(main[:3])
    still = [key for key, value in result["state"].items() if np.array_equal(value, result["start"][key])]
    assert still == [] or RUNS[name].optimizer == GENTLE  # whose steps can be smaller than a weight's rounding


@pytest.mark.multiprocess
def test_no_two_runs_are_the_same(results):
    alone = results(1).values()
    tables = [b"".join(table.tobytes() for table in result["state"].values()) for result in alone]
    assert len(set(tables)) == len(tables)


def more_gradient(result: Result) -> None:
    """Change the result as if the gradients of two rows of a table were 2 % too large."""
    if "table.item.exp_avg" in result["state"]:
        result["state"]["table.item.exp_avg"][[3, 5]] *= 1.02
    else:
        weight, start = result["state"]["table.item.weight"], result["start"]["table.item.weight"]
        weight[[3, 5]] += 0.02 * (weight - start)[[3, 5]]


def swapped_ranks(result: Result) -> None:
    rank = result["ranked"]["test"].rank
    first, last = rank.argmin(), np.where(rank < KS[-1], rank, -1).argmax()
    rank[[first, last]] = rank[[last, first]]


def other_scores(result: Result) -> None:
    result["scores"]["test"][2] += 0.01 * result["scores"]["test"].std()


def other_weights(result: Result) -> None:
    result["state"]["table.user.weight"][1, 0] += 2e-4


def other_loss(result: Result) -> None:
    terms = result["terms"][7]
    terms["bpr"] *= 1 + 3e-5


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["lightgcn, adam", "bprmf, sgd"])
@pytest.mark.parametrize("fault", [more_gradient, swapped_ranks, other_scores, other_weights, other_loss])
def test_the_comparison_notices_a_planted_fault(results, name: str, fault: Any):
    alone = results(1)[name, 0]
    agree(alone, alone, RUNS[name])
    planted = copy.deepcopy(alone)
    fault(planted)
    with pytest.raises(AssertionError):
        agree(planted, alone, RUNS[name])
