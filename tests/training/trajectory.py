"""A short training run in memory, and the comparison of two that must differ only by rounding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from distrec.config import RunConfig, decode
from distrec.data.dataset import Dataset
from distrec.methods.registry import METHODS, resolve
from distrec.parallel.world import World
from distrec.training.ledger import Ledger

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
    "fewest items": (61, 4, 152, 14),
}
ADAM = {"name": "adam", "lr": 2e-3}


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


@dataclass(frozen=True)
class Run:
    """What is trained: the name of a dataset's folder, and sections of a run config."""

    data: str
    method: dict[str, Any]
    optimizer: dict[str, Any]
    seed: int
    batch: int = BATCH
    tolerance: Tolerance = Tolerance()


Result = dict[str, Any]


def config_of(folder: str, run: Run, stage: int = 0) -> RunConfig:
    tree = {
        "data": str(Path(folder, run.data)), "run": {"name": "r"}, "method": run.method, "optimizer": run.optimizer,
        "dense": {"zero_stage": stage}, "train": {"global_batch": run.batch, "seed": run.seed}, "evaluate": {"ks": KS},
    }  # fmt: skip
    return resolve(decode(RunConfig, tree))


def engine_of(config: RunConfig) -> Any:
    from distrec.training.engine import Engine

    return Engine(World.current(), Dataset.open(config.data), config)


def train(engine: Any, first: int = 0, stop: int = STEPS) -> Result:
    """Train the steps from `first` to `stop` as production does, then score and rank both splits. Collective.

    Returns:
        The loss terms and gradient norms of the steps, the ledgers of whole epochs, the state before and after, scores
        and ranks.
    """
    from distrec.training.loop import build_evaluator

    config, data = engine.config, engine.space.data
    out: Result = {"terms": [], "full": [], "norms": [], "ledgers": [], "ranked": {}, "scores": {}}
    out["start"], ledger = whole(engine), Ledger(engine.samples_per_epoch)
    for count in range(first, stop if engine.method.trainable else first):
        epoch, step = divmod(count, engine.steps_per_epoch)
        engine.set_lr(config.optimizer.lr_at(epoch))
        samples = engine.samples(epoch, step)
        out["terms"].append(engine.train_step(epoch, step, samples)[0])
        out["full"].append(len(samples.users) == config.train.global_batch or engine.steps_per_epoch == 1)
        out["norms"] += [] if engine.grad_norm is None else [engine.grad_norm]
        ledger.mark(engine.world, samples.rows)
        if step == engine.steps_per_epoch - 1:
            ledger.merge(engine.world)
            out["ledgers"].append(ledger.close())
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


def agree(found: Result, wanted: Result, run: Run) -> None:
    """Check that losses, gradient norms, tables, dense weights, moments, scores and ranks differ only by rounding."""
    tolerance, lr = run.tolerance, run.optimizer["lr"]
    for step, (ours, theirs) in enumerate(zip(found["terms"], wanted["terms"], strict=True)):
        assert ours.keys() == theirs.keys()
        near(sum(ours.values()), sum(theirs.values()), f"loss of step {step}", absolute=0)
        for term, value in ours.items():
            near(value, theirs[term], f"{term} of step {step}")
    near(found["norms"], wanted["norms"], "norms", absolute=0)
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
        ranks_agree(found, wanted, split, tolerance.scores if METHODS[run.method["name"]].trainable else 0)


def near(found: Any, wanted: Any, what: str, absolute: float = 1e-6) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=absolute, err_msg=what)


def root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))


def ranks_agree(found: Result, wanted: Result, split: str, tolerance: float) -> None:
    """Check that scores agree, and ranks do too, except that items whose scores tie within rounding may swap."""
    scores = wanted["scores"][split]
    gap = tolerance * scores[np.abs(scores) < 1e20].std()  # some methods hide an item behind a score of -1e30
    worst = float(np.abs(found["scores"][split] - scores).max())
    assert worst <= gap, f"scores, {split}: off by {worst:.1e}, more than {gap:.1e}"
    theirs = wanted["ranked"][split]
    user = theirs.user_of_pair()
    others = np.where(wanted["masked"], -np.inf, scores)[user]
    target = scores[user, theirs.item][:, None]
    lowest, highest = (others > target + 2 * gap).sum(1), (others >= target - 2 * gap).sum(1) - 1
    seen = ~wanted["masked"][user, theirs.item]
    if tolerance:
        assert (highest > lowest)[seen].sum() <= max(2, 0.05 * seen.sum()), (
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
