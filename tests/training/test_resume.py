"""Nothing trained twice, nothing lost: crashes anywhere, other numbers of workers. Killed workers: test_on_ray.py."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distrec.cli import main
from distrec.config import RunConfig, load_run
from distrec.data.dataset import Dataset
from distrec.data.storage import open_folder
from distrec.methods.registry import METHODS, resolve
from distrec.parallel.world import World
from distrec.training.checkpoint import Checkpoints
from distrec.training.engine import Engine
from distrec.training.loop import load_weights
from tests.distributed import run_workers
from tests.methods.harness import samples_of
from tests.training import small
from tests.training.steps import full, train_steps


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small.write_small(tmp_path_factory.mktemp("data"))


# One to four crashes, and checkpoints every 0 to 5 steps, among the seeds. `tests/methods/test_every_method.py` crashes
# every method; here, only `wide` does.
@pytest.mark.parametrize(
    ("method", "seed"),
    [
        pytest.param(method, seed, marks=[] if method == "lightgcn" and seed < 2 else pytest.mark.wide)
        for method, kind in METHODS.items()
        if kind.trainable
        for seed in range(5)
    ],
)
def test_crashes_anywhere_change_nothing(tmp_path: Path, data: str, method: str, seed: int) -> None:
    """After a few crashes at random steps, the parts together give the same bits as one uninterrupted run."""
    rng = np.random.default_rng(seed)
    epochs, every, crashes = 4, int(rng.integers(0, 6)), int(rng.integers(1, 5))
    config = small.write_config(
        tmp_path / "run.yaml", data, tmp_path, method, optimizer={"lr_decay": {"factor": 0.5, "epochs": 2}},
        train={"epochs": epochs, "seed": seed, "checkpoint_every": every},
    )  # fmt: skip
    batch = -(-samples_of(resolve(load_run(config))) // 9)  # samples of a step, so that an epoch has 9
    assert main(["train", config, "run.name=whole", f"train.global_batch={batch}"]) == 0
    steps_per_epoch = -(-small.metrics(tmp_path / "whole")[0]["ledger"]["expected"] // batch)
    places = sorted((int(rng.integers(0, epochs)), int(rng.integers(0, steps_per_epoch))) for _ in range(crashes))
    trained: list[tuple[int, int]] = []
    for place in places:
        with small.crash_at(place) as steps:
            assert main(["train", config, f"train.global_batch={batch}"]) == 1
        trained += steps
    with small.crash_at() as steps:
        assert main(["train", config, f"train.global_batch={batch}"]) == 0
    trained += steps

    small.same_losses(tmp_path / "whole", tmp_path / "run", rtol=0)
    want, got = small.tensors(tmp_path / "whole"), small.tensors(tmp_path / "run")
    assert [name for name in want if not want[name].equal(got[name])] == []
    again = Counter(epoch for epoch, _ in trained)
    replayed = [epoch["replayed"] for epoch in small.metrics(tmp_path / "run")]
    assert replayed == [again[epoch] - steps_per_epoch for epoch in range(epochs)], (places, every)
    assert len(small.read(tmp_path / "run", "run.json")["attempts"]) == crashes + 1
    summaries = [small.read(tmp_path / name, "summary.json") for name in ("whole", "run")]
    assert summaries[0]["test"] == summaries[1]["test"]
    assert summaries[0]["best_epoch"] == summaries[1]["best_epoch"]


def test_an_epoch_whose_end_was_not_recorded_is_recorded_after_the_restart(tmp_path: Path, data: str) -> None:
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path)
    assert main(["train", config]) == 0
    run = tmp_path / "run"
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole.splitlines()[0] + "\n")  # killed between checkpoint and metrics
    (run / "summary.json").unlink()
    assert main(["train", config]) == 0
    assert [epoch["epoch"] for epoch in small.metrics(run)] == [1, 2, 3]
    assert "test" in small.read(run, "summary.json")


# --- saved by one worker, continued by several ------------------------------------------------------------------------

SAVED_AFTER, MORE = 4, 3
CONTINUED: dict[str, tuple[str, dict[str, Any]]] = {
    "stair, adamw": ("stair", {"name": "adamw", "weight_decay": 0.3}),
    "stair, adam": ("stair", {"name": "adam", "weight_decay": 0.01}),
    "stair, sgd": ("stair", {"name": "sgd", "weight_decay": 0.01}),
    "mentor, adam": ("mentor", {"name": "adam"}),
}


def continued(folder: str, data: str, configs: dict[str, RunConfig]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """By case, the saved state as loaded here, and the state a few steps later.

    A single worker trains and saves the state, and continues without loading it.
    """
    world, dataset, out = World.current(), Dataset.open(data), {}
    for name, config in configs.items():
        engine, checkpoints = Engine(world, dataset, config), Checkpoints(open_folder(folder), world)
        if world.size == 1:
            train_steps(engine, 0, SAVED_AFTER)
            tensors = {**engine.state(), "ledger": torch.zeros(len(engine.train_rows), dtype=torch.uint8)}
            checkpoints.save(name, tensors, {"optimizer_steps": SAVED_AFTER})
        else:
            load_weights(engine, checkpoints, name)
        saved = full(engine)
        train_steps(engine, SAVED_AFTER, SAVED_AFTER + MORE)
        out[name] = {"saved": saved, "later": full(engine)}
        assert engine.tables.steps == (0 if config.optimizer.name == "sgd" else SAVED_AFTER + MORE)
    return out


@pytest.mark.multiprocess
def test_smoothed_tables_saved_by_one_worker_go_on_at_two_and_three(tmp_path: Path, data: str) -> None:
    """STAIR's moments move to other workers, and smoothing exchanges rows of another partition."""
    configs = {
        name: resolve(load_run(small.write_config(tmp_path / f"{name}.yaml", data, tmp_path, method, optimizer=rule)))
        for name, (method, rule) in CONTINUED.items()
    }
    folder = str(tmp_path / "checkpoints")
    (alone,) = run_workers(continued, 1, folder, data, configs)
    kinds = {name.rpartition(".")[2] for name in alone["stair, adamw"]["saved"] if name.startswith("table.item")}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq"}
    for size in (2, 3):
        for rank, found in enumerate(run_workers(continued, size, folder, data, configs)):
            for name, states in alone.items():
                saved, later = (found[name][moment] for moment in ("saved", "later"))
                assert saved.keys() == later.keys() == states["saved"].keys()
                assert [key for key in saved if not np.array_equal(saved[key], states["saved"][key])] == [], (
                    name,
                    rank,
                )
                for key, value in states["later"].items():
                    assert np.abs(later[key] - value).max() < 2e-5, (name, key, size)
                    assert not np.array_equal(value, states["saved"][key]), f"{name}: {key} stands still"
