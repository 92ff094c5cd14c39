"""Checkpoints: torn ones are skipped, others load at any number of workers and any ZeRO stage, and few are kept."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from distrec.cli import main
from distrec.config import RunConfig, load_run
from distrec.data.dataset import Dataset
from distrec.data.storage import open_folder
from distrec.methods.registry import resolve
from distrec.parallel.world import World
from distrec.training.checkpoint import Checkpoints, is_complete
from distrec.training.engine import Engine
from distrec.training.loop import fit, load_weights
from distrec.training.run_folder import RunFolder, checkpoint_name
from tests.distributed import run_workers
from tests.training import small
from tests.training.steps import full, train_steps
from tests.training.torn import TEARS, tensor_file


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small.write_small(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """An uninterrupted run of the config that the tests below interrupt."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(["train", small.write_config(folder / "run.yaml", data, folder)]) == 0
    return folder / "run"


def assert_same(whole: Path, run: Path) -> None:
    """Check that both runs are bit-identical, as they must be at the same number of workers."""
    small.same_losses(whole, run, rtol=0)
    want, got = small.tensors(whole), small.tensors(run)
    assert want.keys() == got.keys()
    assert [name for name in want if not want[name].equal(got[name])] == []
    first, second = small.read(whole, "summary.json"), small.read(run, "summary.json")
    assert [first[name] for name in ("best_epoch", "valid", "test")] == [
        second[name] for name in ("best_epoch", "valid", "test")
    ]


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_within_an_epoch_is_skipped(
    tmp_path: Path, data: str, whole: Path, tear: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path, train={"checkpoint_every": 4})
    run = tmp_path / "run"
    with small.crash_at((1, 6)):
        assert main(["train", config]) == 1
    *previous, newest = small.checkpoints(run)
    assert newest == "epoch-000001-step-000000004"
    assert is_complete(open_folder(str(run / "checkpoints" / newest)))
    TEARS[tear](run / "checkpoints" / newest)
    assert previous
    here = Checkpoints(open_folder(str(run / "checkpoints")), World(0, 1))
    assert here.newest_intact()[0] == previous[-1]
    if tear != "bit flipped":  # which only the checksums show
        assert not is_complete(open_folder(str(run / "checkpoints" / newest)))
    with small.crash_at() as trained:
        assert main(["train", config]) == 0
    assert trained[0] == (1, 0)
    assert [epoch["replayed"] for epoch in small.metrics(run)] == [0, 6, 0]
    assert list(small.read(run, "run.json")["attempts"][-1]["damaged_checkpoints"]) == [newest]
    assert f"checkpoint '{newest}' is not used: '" in capsys.readouterr().out
    assert_same(whole, run)


@pytest.mark.parametrize("tear", ["tensor file cut short", "no complete.json"])
def test_a_torn_checkpoint_at_the_end_of_an_epoch_is_skipped(tmp_path: Path, data: str, whole: Path, tear: str) -> None:
    """The run is killed while it writes the checkpoint of epoch 2.

    The previous checkpoint still exists, and the rest of epoch 2 runs again.
    """
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path, train={"checkpoint_every": 4})
    with small.crash_at((2, 0)):
        assert main(["train", config]) == 1
    TEARS[tear](tmp_path / "run/checkpoints/epoch-000002-step-000000000")
    with small.crash_at() as trained:
        assert main(["train", config]) == 0
    assert trained[0] == (1, 8)
    assert_same(whole, tmp_path / "run")


def test_without_any_complete_checkpoint_training_starts_over(tmp_path: Path, data: str, whole: Path) -> None:
    config, run = small.write_config(tmp_path / "run.yaml", data, tmp_path), tmp_path / "run"
    with small.crash_at((2, 3)):
        assert main(["train", config]) == 1
    for folder in (run / "checkpoints").iterdir():
        (folder / "complete.json").unlink()
    assert main(["train", config]) == 0
    assert_same(whole, run)


def test_a_torn_best_checkpoint_is_refused_when_it_is_needed(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = small.write_config(tmp_path / "run.yaml", data, tmp_path), tmp_path / "run"
    assert main(["train", config]) == 0
    best = small.read(run, "summary.json")["best_checkpoint"]
    tensor_file(run / "checkpoints" / best).unlink()
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 2
    assert best in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("every", [0, 3])
def test_only_the_newest_two_and_the_best_of_each_are_kept(tmp_path: Path, data: str, seed: int, every: int) -> None:
    config = small.write_config(
        tmp_path / "run.yaml", data, tmp_path, optimizer={"lr": 0.05}, train={"seed": seed, "checkpoint_every": every}
    )
    crash = (3, 8)
    with small.crash_at(crash):
        assert main(["train", config, "train.epochs=5"]) == 1
    values = [epoch["valid"]["recall@20"] for epoch in small.metrics(tmp_path / "run")]
    newest = [(3, step) for step in range(0, 9, every)] if every else [(2, 0), (3, 0)]
    best = {1 + values.index(max(values[:epoch])) for epoch, _ in newest[-2:]}
    kept = {checkpoint_name(*place) for place in (*newest[-2:], *((epoch, 0) for epoch in best))}
    assert small.checkpoints(tmp_path / "run") == sorted(kept)


# --- the same checkpoint at another number of workers -----------------------------------------------------------------

SAVED_AFTER, MORE = 4, 3
CASES = {
    **{f"alignrec-adam-zero{stage}": ("alignrec", {"name": "adam"}, stage) for stage in range(4)},
    "alignrec-adamw-zero1": ("alignrec", {"name": "adamw", "weight_decay": 0.01}, 1),
    "alignrec-sgd-zero2": ("alignrec", {"name": "sgd", "lr": 0.1}, 2),
    "bprmf-sparse": ("bprmf", {"tables": "sparse", "lr": 0.05}, 0),
}


def configs(folder: Path, data: str, shift: int) -> dict[str, RunConfig]:
    """The configs of the cases, with `shift` added to each ZeRO stage (modulo 4)."""
    return {
        name: resolve(load_run(small.write_config(
            folder / f"{name}-{shift}.yaml", data, folder, method, optimizer=optimizer,
            dense={"zero_stage": (stage + shift) % 4},
        )))
        for name, (method, optimizer, stage) in CASES.items()
    }  # fmt: skip


State = dict[str, dict[str, np.ndarray]]


def save_at_this_size(folder: str, data: str, cases: dict[str, RunConfig], run: RunConfig) -> tuple[State, State]:
    """For each case, the state that was saved and the state a few steps later.

    Then `run` trains until it crashes in epoch 2.
    """
    world, dataset = World.current(), Dataset.open(data)
    saved, later = {}, {}
    for name, config in cases.items():
        engine = Engine(world, dataset, config)
        train_steps(engine, 0, SAVED_AFTER)
        tensors = {**engine.state(), "ledger": torch.zeros(len(engine.train_rows), dtype=torch.uint8)}
        Checkpoints(open_folder(folder), world).save(name, tensors, {"optimizer_steps": SAVED_AFTER})
        saved[name] = full(engine)
        train_steps(engine, SAVED_AFTER, SAVED_AFTER + MORE)
        later[name] = full(engine)
    with small.crash_at((1, 6)), pytest.raises(RuntimeError, match="crash"):
        fit(world, dataset, run)
    return saved, later


def load_at_this_size(
    folder: str, data: str, cases: dict[str, RunConfig], run: RunConfig, crash: list[tuple[int, int]]
) -> tuple[State, State]:
    """For each case, the state that was loaded and the state a few steps later.

    Then `run` continues until it ends or crashes.
    """
    world, dataset = World.current(), Dataset.open(data)
    loaded, later = {}, {}
    for name, config in cases.items():
        engine = Engine(world, dataset, config)
        load_weights(engine, Checkpoints(open_folder(folder), world), name)
        loaded[name] = full(engine)
        train_steps(engine, SAVED_AFTER, SAVED_AFTER + MORE)
        later[name] = full(engine)
    with small.crash_at(*crash), pytest.raises(RuntimeError, match="crash") if crash else nullcontext():
        fit(world, dataset, run)
    return loaded, later


@pytest.mark.multiprocess
def test_a_checkpoint_of_two_workers_continues_at_other_sizes_and_stages(tmp_path: Path, data: str) -> None:
    folder, runs = str(tmp_path / "checkpoints"), tmp_path / "runs"
    run = resolve(load_run(small.write_config(tmp_path / "run.yaml", data, runs, train={"checkpoint_every": 4})))
    RunFolder.of(run).open_attempt(run, Dataset.open(data).hash)

    saved, later = run_workers(save_at_this_size, 2, folder, data, configs(tmp_path, data, 0), run)[0]
    moments = {name.rpartition(".")[2] for name in saved["alignrec-adam-zero3"]}
    assert moments == {"weight", "exp_avg", "exp_avg_sq"}
    assert any(name.endswith("sum_of_squares") for name in saved["bprmf-sparse"])
    for size, shift, crash in ((3, 1, [(2, 3)]), (1, 2, [])):
        of_ranks = run_workers(load_at_this_size, size, folder, data, configs(tmp_path, data, shift), run, crash)
        for rank, (loaded, after) in enumerate(of_ranks):
            for case, tensors in saved.items():
                assert loaded[case].keys() == tensors.keys()
                different = [name for name, value in tensors.items() if not np.array_equal(value, loaded[case][name])]
                assert different == [], (case, size, rank)
                for name, value in later[case].items():
                    assert np.abs(value - after[case][name]).max() < 1e-4, (case, name, size)
                    assert not np.array_equal(value, tensors[name]), f"{case}: training does not change {name}"

    # `run` used 2 workers up to step 6 of epoch 2, 3 workers up to step 3 of epoch 3, and then 1. Compare it with an
    # uninterrupted run.
    assert main(["train", str(tmp_path / "run.yaml"), "run.name=whole"]) == 0
    small.same_losses(runs / "whole", runs / "run", rtol=1e-5)
    assert [epoch["replayed"] for epoch in small.metrics(runs / "run")] == [0, 2, 3]
    small.same_tensors(small.tensors(runs / "whole"), small.tensors(runs / "run"), lr=1e-3, steps=27)
