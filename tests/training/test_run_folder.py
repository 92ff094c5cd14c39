"""The files that a run writes, which settings identify it, and how a failing run ends."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import yaml

from distrec.cli import main
from distrec.config import load_run
from distrec.config.bounds import MOST_EPOCHS, MOST_STEPS
from distrec.data.dataset import Dataset
from distrec.data.storage import open_folder
from distrec.methods.registry import resolve
from distrec.training.run_folder import RunFolder, checkpoint_name, checkpoint_place, is_checkpoint
from tests.training import small


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small.write_small(tmp_path_factory.mktemp("data"))


def files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, by relative path."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.mark.parametrize("method", ["lightgcn", "alignrec", "bprmf", "popularity"])
def test_a_finished_run_tells_everything(
    tmp_path: Path, data: str, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path / "runs", method, tracking={"tensorboard": True})
    assert main(["train", config]) == 0
    run, trained = tmp_path / "runs/run", method != "popularity"
    assert load_run(run / "config.yaml") == resolve(load_run(config))

    epochs = small.metrics(run) if trained else []
    rows = Dataset.open(data).manifest.interactions["train"]
    for number, epoch in enumerate(epochs, 1):
        assert epoch["epoch"] == number
        assert epoch["ledger"] == {"expected": rows, "trained": rows, "duplicated": 0, "lost": 0}
        assert epoch["replayed"] == 0
        assert all(math.isfinite(value) for value in epoch["loss"].values())
        assert set(epoch["seconds"]) == {"train", "evaluate", "checkpoint"}
        assert epoch["rows_per_second"] > 0
        assert epoch["peak_memory_bytes"] > 10**7

    summary = small.read(run, "summary.json")
    names = {f"{name}@{k}" for name in ("recall", "ndcg", "precision", "map", "hit") for k in (5, 10, 20, 50)}
    assert set(summary["valid"]) == set(summary["test"]) == names
    if trained:
        values = [epoch["valid"]["recall@20"] for epoch in epochs]
        assert summary["best_epoch"] == 1 + values.index(max(values))  # the first epoch with the best value
        assert summary["valid"] == epochs[summary["best_epoch"] - 1]["valid"]
        assert any((run / "tensorboard").iterdir())

    record = small.read(run, "run.json")
    assert record["identity"]["data"] == Dataset.open(data).hash
    (attempt,) = record["attempts"]
    assert (attempt["workers"], attempt["outcome"]) == (0, "done")
    assert {"python", "torch", "torchrec", "distrec"} <= set(record["versions"])
    assert [entry["table"] for entry in record["plan"]] == {
        "lightgcn": ["user", "item"],
        "bprmf": ["user", "item"],
        "alignrec": ["user", "item", "content"],
        "popularity": [],
    }[method]  # fmt: skip
    printed = capsys.readouterr().out
    for line in record["degradations"]:
        assert f"  note     {line}\n" in printed
    assert any("CUDA" in line for line in record["degradations"])
    assert any("lack feature 'text'" in line for line in record["degradations"]) == (method == "alignrec")


def test_sparse_tables_are_a_named_degradation(tmp_path: Path, data: str) -> None:
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path / "runs", "bprmf", optimizer={"tables": "sparse"})
    assert main(["train", config]) == 0
    assert any("row-wise Adagrad" in line for line in small.read(tmp_path / "runs/run", "run.json")["degradations"])


def test_the_same_command_again_trains_nothing_and_keeps_the_result(tmp_path: Path, data: str) -> None:
    config, run = small.write_config(tmp_path / "run.yaml", data, tmp_path / "runs"), tmp_path / "runs/run"
    assert main(["train", config]) == 0
    before, summary = files(run / "checkpoints"), small.read(run, "summary.json")
    losses = [epoch["loss"] for epoch in small.metrics(run)]
    assert main(["train", config]) == 0
    assert files(run / "checkpoints") == before
    assert [epoch["loss"] for epoch in small.metrics(run)] == losses
    again = small.read(run, "summary.json")
    assert (again["valid"], again["test"]) == (summary["valid"], summary["test"])
    assert len(small.read(run, "run.json")["attempts"]) == 2


DECAY = "optimizer.lr_decay={factor: 0.9, epochs: 10}"


@pytest.mark.parametrize(
    ("first", "second", "key", "values"),
    [
        ([], ["method.layers=2"], "method.layers", ("4", "2")),
        ([], ["method.name=bprmf"], "method.name", ("lightgcn", "bprmf")),
        ([], ["optimizer.lr=2e-3"], "optimizer.lr", ("0.001", "0.002")),
        ([], ["optimizer.betas=[0.8, 0.999]"], "optimizer.betas", ("0.9", "0.8")),
        ([], [DECAY], "optimizer.lr_decay", ("None", "0.9")),
        ([DECAY], [], "optimizer.lr_decay", ("0.9", "None")),
        ([], ["train.seed=2"], "train.seed", ("1", "2")),
        ([], ["train.global_batch=65"], "train.global_batch", ("64", "65")),
        ([], ["train.metric=ndcg@20"], "train.metric", ("recall@20", "ndcg@20")),
        ([], ["evaluate.mask=none"], "evaluate.mask", ("train", "'distrec evaluate --mask'")),
        ([], ["evaluate.ks=[5, 20]"], "evaluate.ks", ("[5, 20]", "'distrec evaluate --ks'")),
    ],
)
def test_another_identity_under_the_same_name_is_refused(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str],
    first: list[str], second: list[str], key: str, values: tuple[str, str],
) -> None:  # fmt: skip
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path / "runs", train={"epochs": 1})
    assert main(["train", config, *first]) == 0
    before = files(tmp_path / "runs")
    capsys.readouterr()
    assert main(["train", config, *second]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert [part for part in (key, *values, "'run.name'", str(tmp_path / "runs/run")) if part not in message] == []
    assert files(tmp_path / "runs") == before  # the existing run is untouched


@pytest.mark.parametrize(
    "override",
    ["train.epochs=2", "train.threads=2", "train.patience=1", "train.checkpoint_every=2", "evaluate.test=false",
     "dense.zero_stage=2", "train.max_failures=0"],
)  # fmt: skip
def test_what_is_no_part_of_the_identity_may_change(tmp_path: Path, data: str, override: str) -> None:
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path / "runs", train={"epochs": 1})
    assert main(["train", config]) == 0
    assert main(["train", config, override]) == 0
    record = small.read(tmp_path / "runs/run", "run.json")
    assert len({attempt["config_sha256"] for attempt in record["attempts"]}) == 2
    assert (
        yaml.safe_load((tmp_path / "runs/run/config.yaml").read_text())
        == resolve(load_run(config, [override])).model_dump()
    )


def test_another_dataset_under_the_same_name_is_refused(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path / "runs", train={"epochs": 1})
    assert main(["train", config]) == 0
    other = small.write_small(tmp_path / "other", seed=5)
    capsys.readouterr()
    assert main(["train", config, f"data={other}"]) == 2
    message = capsys.readouterr().err
    assert "another dataset" in message
    assert other in message
    # A copy of the same dataset elsewhere is the same dataset.
    assert main(["train", config, f"data={shutil.copytree(data, tmp_path / 'copy')}"]) == 0


def test_a_checkpoint_from_another_dataset_is_refused(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path / "runs", train={"epochs": 1})
    assert main(["train", config]) == 0
    other = small.write_small(tmp_path / "other", seed=5)
    assert main(["train", config, f"data={other}", "run.name=next"]) == 0
    shutil.rmtree(tmp_path / "runs/next/checkpoints")
    shutil.copytree(tmp_path / "runs/run/checkpoints", tmp_path / "runs/next/checkpoints")
    capsys.readouterr()
    assert main(["train", config, f"data={other}", "run.name=next", "train.epochs=2"]) == 2
    message = capsys.readouterr().err
    assert [part for part in ("epoch-000001", "another dataset", other) if part not in message] == []


def test_early_stopping_counts_evaluations_without_strict_improvement(tmp_path: Path, data: str) -> None:
    config = small.write_config(
        tmp_path / "run.yaml", data, tmp_path / "runs", optimizer={"name": "sgd", "lr": 1e-12}, train={"epochs": 40}
    )
    assert main(["train", config, "train.patience=3", "train.eval_every=2"]) == 0
    run = tmp_path / "runs/run"
    epochs = small.metrics(run)
    assert len(epochs) == 8  # epoch 2 is the best; 4, 6 and 8 are no better
    assert ["valid" in epoch for epoch in epochs] == [False, True] * 4
    assert small.read(run, "summary.json")["best_epoch"] == 2
    assert main(["train", config, "train.patience=4", "train.eval_every=2"]) == 0  # with more patience it continues
    assert len(small.metrics(run)) == 10


def test_more_epochs_continue_a_finished_run(tmp_path: Path, data: str) -> None:
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path / "runs")
    assert main(["train", config, "run.name=once", "train.epochs=5"]) == 0
    for epochs in (2, 5):
        assert main(["train", config, "run.name=twice", f"train.epochs={epochs}"]) == 0
    once, twice = (small.metrics(tmp_path / "runs" / name) for name in ("once", "twice"))
    assert [(e["loss"], e["valid"]) for e in once] == [(e["loss"], e["valid"]) for e in twice]
    summaries = [small.read(tmp_path / "runs" / name, "summary.json")["test"] for name in ("once", "twice")]
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize(
    ("method", "overrides", "told"),
    [
        ("lightgcn", ["optimizer.name=sgd", "optimizer.lr=1e30"], ["loss term 'bpr'", "epoch 1, step 2", "none"]),
        ("bprmf", ["optimizer.name=sgd", "optimizer.lr=1e30"], ["loss term 'bpr'", "epoch 1, step 2", "none"]),
        ("bprmf", ["optimizer.name=sgd", "optimizer.lr=1e30", "train.global_batch=4096"], ["score", "epoch 1", "none"]),
        (
            "bprmf", ["optimizer.name=sgd", "optimizer.lr=1e6", "train.checkpoint_every=1"],
            ["epoch 1", "epoch-000000-step"],
        ),
    ],
)  # fmt: skip
def test_a_loss_that_overflows_ends_with_status_3(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str], method: str, overrides: list[str], told: list[str]
) -> None:
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path / "runs", method)
    for _ in range(2):  # repeating the command fails the same way
        assert main(["train", config, *overrides]) == 3
        (message,) = capsys.readouterr().err.splitlines()
        assert [part for part in [*told, "Last good checkpoint"] if part not in message] == []
        run = tmp_path / "runs/run"
        assert small.read(run, "run.json")["attempts"][-1]["exit_status"] == 3
        assert not (run / "summary.json").exists()
        if (run / "checkpoints").exists():
            last = message.rpartition("Last good checkpoint: ")[2].rstrip(".")
            assert last == small.checkpoints(run)[-1]
            for name, tensor in small.tensors(run, last).items():
                assert tensor.isfinite().all(), name


def test_an_unexpected_error_ends_with_status_1(tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path / "runs")
    with small.crash_at((0, 0)):
        assert main(["train", config]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_run_on_an_object_store_is_the_local_one(tmp_path: Path, data: str, s3: str) -> None:
    import s3fs

    there = f"{s3}/data"
    s3fs.S3FileSystem().put(data, there, recursive=True)
    local = small.write_config(
        tmp_path / "local.yaml", data, tmp_path / "runs", "alignrec", train={"checkpoint_every": 4}
    )
    remote = small.write_config(
        tmp_path / "remote.yaml", there, f"{s3}/runs", "alignrec",
        train={"checkpoint_every": 4}, tracking={"tensorboard": True},
    )  # fmt: skip
    assert main(["train", local]) == 0
    assert main(["train", remote, "train.epochs=1"]) == 0
    assert main(["train", remote]) == 0
    assert main(["evaluate", f"{s3}/runs/run"]) == 0
    assert main(["evaluate", str(tmp_path / "runs/run")]) == 0
    copy = tmp_path / "copy"
    s3fs.S3FileSystem().get(f"{s3}/runs/run", str(copy), recursive=True)
    run = tmp_path / "runs/run"
    for name in ("valid", "test", "best_epoch"):
        assert small.read(copy, "summary.json")[name] == small.read(run, "summary.json")[name]
    assert [epoch["loss"] for epoch in small.metrics(copy)] == [epoch["loss"] for epoch in small.metrics(run)]
    assert [epoch["ledger"] for epoch in small.metrics(copy)] == [epoch["ledger"] for epoch in small.metrics(run)]
    assert small.read(copy, "evaluation/test.json") == small.read(run, "evaluation/test.json")
    here, back = small.tensors(run), small.tensors(copy)
    assert here.keys() == back.keys()
    assert all(here[name].equal(back[name]) for name in here)
    assert any((copy / "tensorboard").iterdir())
    assert not os.path.exists("s3:")


def test_evaluation_repeats_the_summary(tmp_path: Path, data: str) -> None:
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path / "runs", "alignrec")
    assert main(["train", config]) == 0
    run = tmp_path / "runs/run"
    for split in ("valid", "test"):
        assert main(["evaluate", str(run), "--split", split]) == 0
        report, summary = small.read(run, f"evaluation/{split}.json"), small.read(run, "summary.json")
        assert {name: report["metrics"][name] for name in summary[split]} == summary[split]
        assert json.dumps(report).find("NaN") == -1


def test_names_of_checkpoints_sort_in_training_order() -> None:
    places = [(0, 0), (0, 7), (0, MOST_STEPS), (9, 12), (10, 2), (MOST_EPOCHS, MOST_STEPS)]
    names = [checkpoint_name(*place) for place in places]
    assert names == sorted(names)
    assert [checkpoint_place(name) for name in names if is_checkpoint(name)] == places
    for other in ("epoch-0000010-step-000000000", "epoch-000001-step-0000000000", "epoch-1-step-2", f"{names[0]}.bak"):
        assert not is_checkpoint(other)  # with more digits it would sort in another place


def test_epochs_that_were_shown_are_not_checked_again(tmp_path: Path) -> None:
    lines = [json.dumps(small.planted_epoch(number)) for number in (1, 2, 3)]
    run = RunFolder(open_folder(str(tmp_path)))
    run.folder.write_bytes("\n".join(["shown before", *lines[1:]]).encode(), "metrics.jsonl")
    assert run.read_metrics() == []
    assert [epoch["epoch"] for epoch in run.read_metrics(1)] == [2, 3]
    assert run.read_metrics(3) == run.read_metrics(7) == []
    run.folder.write_bytes("\n".join([*lines[:1], *lines]).encode(), "metrics.jsonl")
    assert run.read_metrics(1) == []  # the second line is of the first epoch
