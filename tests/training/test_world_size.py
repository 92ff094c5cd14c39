"""Promise 1 of docs/design.md: the trajectory does not depend on the number of workers, sharding or ZeRO stage."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from distrec.config import RunConfig, decode
from distrec.data.dataset import Dataset
from distrec.methods.registry import METHODS, resolve
from distrec.parallel.world import World
from distrec.runtime import quiet
from tests.distributed import run_workers
from tests.training.random_data import write_random

STEPS, BATCH = 20, 50
KS = [5, 10, 20, 100]  # every rank is at most 100: no dataset has more items
# Users, items, training rows, seed. Each epoch ends with a batch of 1 to 3 rows: with 4 workers some have none.
# The numbers of workers divide neither the counts nor the batch sizes. With 9 users on 4 workers, the last worker has
# no users; with 4 users or 4 items on 3 workers, the last worker has no users or no items.
DATASETS = {
    "more users": (61, 23, 302, 0),
    "more items": (17, 90, 101, 1),
    "few users": (9, 31, 203, 2),
    "fewest users": (4, 31, 103, 3),
    "fewest items": (61, 4, 152, 4),
}
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
# Without noise, tokens that start at zero are equally near to all interests, so rounding would decide the assignment.
CLOSE = PROTOTYPE | {"gumbel": "close", "nce": "intended", "zero_tokens": False}
GENTLE = {"name": "sgd", "lr": 1e-3}  # the contrast's first gradients are large, since its vectors are near zero
UNPERTURBED = MENTOR | {"mask_weight_g": 0.0, "item_layers": 2}
INTENT = MENTOR | {"variant": "intent"}


def title(method: dict[str, Any]) -> str:
    return " ".join([method["name"], *(method[key] for key in ("variant", "level", "gaussian") if key in method)])


@dataclass(frozen=True)
class Run:
    data: str
    method: dict[str, Any]
    optimizer: dict[str, Any]
    seed: int
    batch: int = BATCH


RUNS: dict[str, Run] = {
    f"{title(method)}, {optimizer['name']}, {data}": Run(data, method, optimizer, seed)
    for seed, (data, method, optimizer) in enumerate(
        [(data, method, ADAM) for data in list(DATASETS)[:3] for method in (ALIGNREC, LIGHTGCN, BPRMF)]
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
        + [("fewest users", LIGHTGCN, ADAM), ("fewest users", INTENT, ADAM), ("fewest users", SASREC, ADAM)]
        + [("fewest items", method | {"knn_k": 3}, ADAM) for method in (ALIGNREC, MENTOR)]
        + [("fewest items", STAIR_TEXT | {"dim": 3}, ADAM), ("fewest items", ODMT, ADAM)]
        + [("fewest items", {"name": "popularity"}, ADAM)]
    )
}
RUNS["bprmf, sparse tables"] = Run("more users", BPRMF, {"tables": "sparse", "lr": 0.05}, 50)
RUNS["odmt, sparse tables"] = Run("more users", ODMT | {"id_dim": 8}, {"tables": "sparse", "lr": 2e-3}, 51)
RUNS["sasrec, small batches"] = Run("few users", SASREC, CLIPPED, 52, batch=4)

# The runs that `make test` trains, with 1, 2 and 3 workers, and what each of them covers; the other runs are wide.
DEFAULT = {
    "alignrec, adam, more users",  # a table initialised from features, item graph, gate
    "alignrec, adam, fewest items",  # dense module and item graph on a worker without items
    "lightgcn, adam, more items",  # one row in the last batch, so a worker without rows
    "lightgcn, adam, fewest users",  # user-item graph on a worker without users
    "bprmf, sgd, more users",  # SGD
    "bprmf, sparse tables",  # TorchRec's fused tables
    "stair, adamw, more users",  # smoothed updates under a falling learning rate
    "stair, adam, fewest items",  # smoothed updates on a worker without items
    "mentor, adam, more users",  # many towers, keyed noise
    "mentor, adam, fewest items",  # item graph of two modalities on a worker without items
    "mentor intent, adam, fewest users",  # the paper's variant, on a worker without users
    "sasrec, small batches",  # histories, clipping, a falling learning rate, a worker without rows of a batch
    "sasrec, adam, fewest users",  # ranking by histories on a worker without users
    "odmt, adamw, more users",  # tokens, items encoded by their owners, clipping
    "odmt, sgd, more items",  # the other mask, a table initialised from tokens
    "odmt, adam, few users",  # a table tied to tokens, an item encoded once per position
    "odmt, adam, fewest items",  # tokens on a worker without items
    "odmt, sparse tables",  # fused tables together with a dense module
    "bivrec, adam, more users",  # two views, keyed Gumbel noise, several vectors per user
    "bivrec prototype, adam, more users",  # the authors' code
    "bivrec position, sgd, more items",  # the other interpretations of the paper, ranked by both views
    "popularity, adam, fewest items",  # ranking without training, on a worker without items
}
ZERO = ["alignrec, adam, more users", "alignrec, adamw, more users", "alignrec, sgd, more items"]
ZERO += ["mentor, adam, more users", "mentor intent, adam, more users", "sasrec, adam, more users"]
ZERO += ["odmt, adamw, more users"]
ZERO += ["bivrec, adam, more users", "bivrec prototype, adam, more users"]
# In this order: one small module; clipping over partitions; a module whose inputs are functions of other tables.
ZERO_DEFAULT = {"alignrec, adam, more users", "odmt, adamw, more users", "bivrec, adam, more users"}


@dataclass(frozen=True)
class Tolerance:
    """The largest allowed differences between two runs: about ten times those of all runs with 2, 3 and 4 workers.

    Attributes:
        gradients: the difference of moments and of SGD's total updates, relative to their root mean square over the
            tensor. Both are linear in the gradients, so that a single faulty row is noticed.
        weights: the difference of weights under Adam, in learning rates. Adam divides by the gradient's size. An
            element whose gradient consists of rounding errors therefore differs more than its moments do.
        scores: the difference of scores, relative to their standard deviation.
        most: the 0.999 quantile of the difference of a table's weights under Adam, in learning rates. No bound by
            default, since `weights` limits every element.
    """

    gradients: float = 1e-3
    weights: float = 0.05
    scores: float = 1e-4
    most: float = np.inf


# BiVRec assigns each item to the interest with the highest score. If two scores are close, rounding can change it.
TOLERANCES = {"bivrec": Tolerance(1e-2, 0.1), "popularity": Tolerance(0, 0, 0)}
# Without noise, more of these scores are close, so a few elements may differ more.
CLOSE_TOLERANCE = Tolerance(0.1, 2.0, most=0.05)


def tolerance_of(run: Run) -> Tolerance:
    return CLOSE_TOLERANCE if run.method == CLOSE else TOLERANCES.get(run.method["name"], Tolerance())


Result = dict[str, Any]


def train(folder: str, run: Run, stage: int) -> Result:
    """Train twenty steps as production does, then score and rank both splits.

    Returns:
        The loss terms and gradient norms of the steps, the state before and after, scores and ranks.
    """
    from distrec.training.engine import Engine
    from distrec.training.loop import build_evaluator

    tree = {
        "data": folder, "run": {"name": "r"}, "method": run.method, "optimizer": run.optimizer,
        "dense": {"zero_stage": stage}, "train": {"global_batch": run.batch, "seed": run.seed}, "evaluate": {"ks": KS},
    }  # fmt: skip
    config = resolve(decode(RunConfig, tree))
    data = Dataset.open(str(Path(folder, run.data)))
    engine = Engine(World.current(), data, config)
    out: Result = {"terms": [], "full": [], "norms": [], "start": whole(engine), "ranked": {}, "scores": {}}
    for count in range(STEPS if engine.method.trainable else 0):
        epoch, step = divmod(count, engine.steps_per_epoch)
        engine.set_lr(config.optimizer.lr_at(epoch))
        samples = engine.samples(epoch, step)
        out["terms"].append(engine.train_step(epoch, step, samples)[0])
        out["full"].append(len(samples.users) == run.batch or engine.steps_per_epoch == 1)
        out["norms"] += [] if engine.grad_norm is None else [engine.grad_norm]
    out["state"] = whole(engine)
    for split in ("valid", "test"):
        evaluator = build_evaluator(engine, split, data.interactions(split), config)
        final = engine.representations(split)
        with torch.no_grad():
            out["ranked"][split] = evaluator.rank(final.users, final.items, engine.method.score)
            users = engine.world.gather_blocks(final.users, engine.space.users)
            items = engine.world.gather_blocks(final.items, engine.space.items)
            out["scores"][split] = engine.method.score(users, items).double().numpy()
    out["masked"] = np.zeros((data.users, data.items), bool)
    out["masked"][engine.train_rows.user, engine.train_rows.item] = True
    return out


def whole(engine: Any) -> dict[str, np.ndarray]:
    """Tables, dense weights and their moments by name, as whole tensors. Collective."""
    state = engine.state().items()
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().double().numpy().copy()
        for name, value in state
    }


def train_all(folder: str, runs: list[tuple[str, int]]) -> list[Result]:
    quiet()
    results = [train(folder, RUNS[name], stage) for name, stage in runs]
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


def agree(found: Result, wanted: Result, run: Run) -> None:
    """Check that losses, gradient norms, tables, dense weights, moments, scores and ranks differ only by rounding."""
    tolerance, lr = tolerance_of(run), run.optimizer["lr"]
    for step, (ours, theirs) in enumerate(zip(found["terms"], wanted["terms"], strict=True)):
        assert ours.keys() == theirs.keys()
        assert sum(ours.values()) == pytest.approx(sum(theirs.values()), rel=1e-5), f"loss of step {step}"
        for term, value in ours.items():
            assert value == pytest.approx(theirs[term], rel=1e-5, abs=1e-6), f"{term} of step {step}"
    assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
    assert found["state"].keys() == wanted["state"].keys()
    sizes = {key: root_mean_square(value) for key, value in wanted["state"].items()}
    for key, theirs in wanted["state"].items():
        kind = key.rpartition(".")[2]
        if kind != "weight":
            # A gradient that is zero in exact arithmetic consists of rounding errors, so its size is no yardstick.
            largest = max(size for other, size in sizes.items() if other.endswith(f".{kind}"))
            floor = largest * (1e-9 if kind == "exp_avg" else 1e-18)
            bound = tolerance.gradients * max(sizes[key], floor)
        elif run.optimizer.get("name") == "sgd":
            moved = root_mean_square(theirs - wanted["start"][key])
            bound = tolerance.gradients * moved + 4 * np.finfo(np.float32).eps * np.abs(theirs).max()
        else:
            bound = tolerance.weights * lr
        difference = np.abs(found["state"][key] - theirs)
        worst = float(difference.max())
        assert worst <= bound, f"{key} is off by {worst:.1e}, more than {bound:.1e}"
        if kind == "weight" and key.startswith("table."):
            assert np.quantile(difference, 0.999, method="lower") <= tolerance.most * lr, f"most of {key}"
    for split in wanted["ranked"]:
        ranks_agree(found, wanted, split, tolerance.scores)


def root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))


def ranks_agree(found: Result, wanted: Result, split: str, tolerance: float) -> None:
    """Check that scores agree, and ranks do too, except that items whose scores tie within rounding may swap."""
    scores = wanted["scores"][split]
    near = tolerance * scores[np.abs(scores) < 1e20].std()  # some methods hide an item behind a score of -1e30
    worst = float(np.abs(found["scores"][split] - scores).max())
    assert worst <= near, f"scores, {split}: off by {worst:.1e}, more than {near:.1e}"
    theirs = wanted["ranked"][split]
    user = theirs.user_of_pair()
    others = np.where(wanted["masked"], -np.inf, scores)[user]
    target = scores[user, theirs.item][:, None]
    lowest, highest = (others > target + 2 * near).sum(1), (others >= target - 2 * near).sum(1) - 1
    seen = ~wanted["masked"][user, theirs.item]
    if tolerance:
        assert (highest > lowest)[seen].sum() <= max(1, 0.05 * seen.sum()), (
            "there must be few near-ties, or comparing ranks proves nothing"
        )
    else:
        np.testing.assert_array_equal(found["ranked"][split].rank, theirs.rank)
    for ours in (found["ranked"][split], theirs):
        for name in ("user", "item", "masked"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        np.testing.assert_array_equal(ours.masked, ~seen)
        unexplained = seen & ((ours.rank < lowest) | (ours.rank > highest))
        assert not unexplained.any(), f"ranks of users {user[unexplained]}, {split}"


def runs_of(names: Any, default: set[str]) -> Any:
    return [pytest.param(name, marks=() if name in default else pytest.mark.wide) for name in names]


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [2, 3, pytest.param(4, marks=pytest.mark.wide)])
@pytest.mark.parametrize("name", runs_of(RUNS, DEFAULT))
def test_any_number_of_workers_gives_the_same_trajectory(results, name: str, size: int):
    agree(results(size)[name, 0], results(1)[name, 0], RUNS[name])


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", runs_of(ZERO, ZERO_DEFAULT))
def test_any_zero_stage_gives_the_same_trajectory(results, name: str, stage: int):
    agree(results(2)[name, stage], results(1)[name, 0], RUNS[name])


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", runs_of([name for name in RUNS if "popularity" not in name], DEFAULT))
def test_a_run_does_train(results, name: str):
    """The loss falls and every weight changes. Scores differ between splits only for methods that read histories.

    Otherwise the comparison would prove nothing.
    """
    result = results(1)[name, 0]
    main = next(term for term in ("bpr", "ce", "ce_id") if term in result["terms"][0])
    full = [terms[main] for terms, whole in zip(result["terms"], result["full"], strict=True) if whole]
    assert np.mean(full[-3:]) < np.mean(full[:3])
    still = [key for key, value in result["state"].items() if np.array_equal(value, result["start"][key])]
    assert still == [] or RUNS[name].optimizer == GENTLE  # whose steps can be smaller than a weight's rounding
    same = np.array_equal(result["scores"]["valid"], result["scores"]["test"])
    assert same != METHODS[RUNS[name].method["name"]].reads_histories


def test_every_method_is_in_the_default_runs():
    assert {RUNS[name].method["name"] for name in DEFAULT} == set(METHODS)
    assert set(ZERO_DEFAULT) <= set(ZERO)


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
@pytest.mark.parametrize("name", ["lightgcn, adam, more items", "bprmf, sgd, more users"])
@pytest.mark.parametrize("fault", [more_gradient, swapped_ranks, other_scores, other_weights, other_loss])
def test_the_comparison_notices_a_planted_fault(results, name: str, fault: Any):
    alone = results(1)[name, 0]
    agree(alone, alone, RUNS[name])
    planted = copy.deepcopy(alone)
    fault(planted)
    with pytest.raises(AssertionError):
        agree(planted, alone, RUNS[name])
