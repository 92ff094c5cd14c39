"""What a run and its evaluations say about themselves, and that they never contradict each other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from distrec.cli import main
from distrec.training.evaluate import short_names
from tests.training import small

KS = [5, 10, 20, 50]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small.write_small(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs `a/x` and `b/x`, and `b/none` with another mask."""
    storage = tmp_path_factory.mktemp("trained")
    for folder, name, mask in (("a", "x", "train"), ("b", "x", "train"), ("b", "none", "none")):
        config = small.write_config(
            storage / "run.yaml", data, storage / folder, "popularity" if folder == "b" else "lightgcn",
            run={"name": name}, evaluate={"mask": mask},
        )  # fmt: skip
        assert main(["train", config]) == 0
    return storage


@pytest.fixture
def storage(tmp_path: Path, trained: Path) -> Path:
    """A copy of the finished runs."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def about(run: Path, name: str) -> list[dict[str, Any]]:
    """What each file of an evaluation says that it is about."""
    table = pq.read_schema(run / f"evaluation/{name}-users.parquet").metadata[b"distrec"]
    whole = small.read(run, f"evaluation/{name}.json")
    parts = [json.loads(table), small.read(run, f"evaluation/{name}-examples.json")["about"]]
    assert all(whole.items() >= part.items() for part in parts)
    assert all(part.keys() == parts[0].keys() for part in parts)
    return parts


def test_all_files_of_a_run_name_the_same_rule(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also after attempts to rank the finished run by another rule."""
    run = storage / "a/x"
    config = small.write_config(storage / "again.yaml", yaml.safe_load((run / "config.yaml").read_text())["data"],
                                storage / "a", run={"name": "x"})  # fmt: skip
    assert main(["evaluate", str(run)]) == 0
    before = {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for rule in ("evaluate.mask=none", "evaluate.ks=[20]", "train.metric=ndcg@20"):
        assert main(["train", config, rule]) == 2
    assert main(["evaluate", str(run), "--mask", "none"]) == 0
    after = {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    assert sorted(Path(path).name for path in after.keys() - before.keys()) == [
        "test-mask-none-examples.json", "test-mask-none-users.parquet", "test-mask-none.json",
    ]  # fmt: skip

    summary, rule = small.read(run, "summary.json"), yaml.safe_load((run / "config.yaml").read_text())
    assert summary["mask"] == rule["evaluate"]["mask"] == "train"
    assert summary["ks"] == rule["evaluate"]["ks"] == KS
    assert summary["metric"] == rule["train"]["metric"] == "recall@20"
    assert summary["users"] == {"valid": small.USERS, "test": small.USERS}
    for part in about(run, "test"):
        assert {key: part[key] for key in ("run", "method", "mask", "ks")} == {
            key: summary[key] for key in ("run", "method", "mask", "ks")
        }
        assert (part["split"], part["users"]) == ("test", small.USERS)
        assert part["training"].items() <= summary.items()
    assert small.read(run, "evaluation/test.json")["metrics"] == summary["test"]
    assert {part["mask"] for part in about(run, "test-mask-none")} == {"none"}
    assert small.read(run, "evaluation/test-mask-none.json")["metrics"] != summary["test"]

    assert main(["evaluate", str(run), "--mask", "train+valid", "--split", "valid", "--ks", "3", "20"]) == 0
    assert {tuple(part["ks"]) for part in about(run, "valid-mask-train-valid")} == {(3, *KS)}
    printed = capsys.readouterr().out
    assert f"valid: {small.USERS} users, ranking all items but the user's train items (mask train+valid)" in printed
    assert f"test: {small.USERS} users, ranking all items (mask none)" in printed


def test_banner_and_table_name_mask_split_and_users_and_how_training_ended(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small.write_config(
        tmp_path / "run.yaml", data, tmp_path, train={"epochs": 1}, evaluate={"mask": "train+valid", "ks": [5, 20]}
    )
    assert main(["train", config]) == 0
    banner, _, table = capsys.readouterr().out.partition("epoch ")
    items = {"valid": "train items", "test": "train and valid items"}
    for split, name in items.items():
        rule = f"{small.USERS} users, ranking all items but the user's {name} (mask train+valid)"
        assert f"  {split:<7}  {rule}, cut-offs 5, 20\n" in banner
        assert f"  {split}: {rule}\n" in table
    assert "best epoch 1 of 1: still improving at the last evaluation; raise 'train.epochs'" in table
    summary = small.read(tmp_path / "run", "summary.json")
    assert (summary["end"], summary["best_is_last"], summary["evaluations_since_best"]) == ("epochs", True, 0)
    still = ["train.epochs=9", "train.patience=1", "optimizer.lr=1e-12", "optimizer.name=sgd", "run.name=still"]
    assert main(["train", config, *still]) == 0
    assert "stopped by 'train.patience' after 1 evaluation without" in capsys.readouterr().out
    summary = small.read(tmp_path / "still", "summary.json")
    assert (summary["end"], summary["best_is_last"], summary["epochs"]) == ("patience", False, 2)
    # More epochs do not help a run that patience stopped, fewer do not change what was trained.
    assert main(["train", config, *still, "train.epochs=2"]) == 0
    assert small.read(tmp_path / "still", "summary.json")["end"] == "epochs"


def test_compared_runs_of_one_name_keep_their_own_rows(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [f"{storage}/a/x", f"{storage}/b/x", f"{storage}/a/x/"]
    capsys.readouterr()
    assert main(["evaluate", *runs, "--split", "valid"]) == 0
    table = capsys.readouterr().out.rpartition("valid, ranking")[2]
    assert table.startswith(" all items but the user's train items (mask train)\n")
    head, *rows = table.split("\n\n")[1].splitlines()
    assert head.split("  ")[-1] == "cold items: ndcg@20"
    assert sorted(row.split()[0] for row in rows) == ["a/x", "b/x"]
    for row in rows:
        name, users, recall, *_ = row.split()
        assert int(users) == small.USERS
        metrics = small.read(storage / name, "evaluation/valid.json")["metrics"]
        assert recall == f"{metrics['recall@20']:.4f}"
    assert "Still improving" in table or small.read(storage / "a/x", "summary.json")["best_epoch"] < 3


def test_runs_with_different_masks_are_compared_only_under_one(
    storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [f"{storage}/a/x", f"{storage}/b/none"]
    capsys.readouterr()
    assert main(["evaluate", *runs]) == 2
    told = capsys.readouterr()
    assert "mask 'train'" in told.err
    assert "mask 'none'" in told.err
    assert "--mask" in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert not (storage / "a/x/evaluation").exists()
    assert main(["evaluate", *runs, "--mask", "none"]) == 0
    assert "test, ranking all items (mask none)" in capsys.readouterr().out
    assert not (storage / "a/x/evaluation/test.json").exists()
    assert (storage / "b/none/evaluation/test.json").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "is not valid JSON"),
        ("[]", "has no metrics of split 'test'"),
        ("{}", "has no metrics of split 'test'"),
        ('{"test": 3}', "has no metrics of split 'test'"),
        ('{"test": {"oracle": 3}}', "'oracle' of split 'test' is 3"),
        ('{"test": {"oracle": {"recall@20": "much"}}}', "'oracle.recall@20' of split 'test' is 'much'"),
        ('{"test": {"oracle": {"recall@20": null}}}', "'oracle.recall@20' of split 'test' is None"),
        ("[" * 100_000, "is nested more than 32 deep"),
    ],
)
def test_a_file_of_other_metrics_is_refused_before_anything_is_ranked(
    tmp_path: Path, trained: Path, content: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = tmp_path / "beside.json"
    beside.write_text(content)
    assert main(["evaluate", f"{trained}/a/x", "--beside", str(beside)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"distrec evaluate: file '{beside}' of --beside")
    assert told in line
    assert not (trained / "a/x/evaluation").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"best_checkpoint": null}', "[" * 100_000, "\xff"])
def test_a_damaged_summary_is_refused_and_training_writes_it_again(
    tmp_path: Path, trained: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(trained / "b/x", tmp_path / "x"))
    (run / "summary.json").write_bytes(content.encode("latin-1"))
    assert main(["evaluate", str(run)]) == 2
    told = capsys.readouterr().err
    assert "summary.json' cannot be used (" in told
    assert told.count("\n") == 1
    if not content:
        assert main(["train", str(run / "config.yaml"), f"run.storage={tmp_path}"]) == 0
        assert main(["evaluate", str(run)]) == 0


@pytest.mark.parametrize("ks", [["0"], ["-3"]])
def test_an_impossible_cut_off_is_refused(trained: Path, ks: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", f"{trained}/a/x", "--ks", *ks]) == 2
    assert "'evaluate.ks'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/x"], ["x"]),
        (["a/x", "a/y", "a/x/"], ["x", "y"]),
        (["a/x", "b/x"], ["a/x", "b/x"]),
        (["s3://one/a/x", "s3://two/a/x", "z"], ["one/a/x", "two/a/x", "{here}/z"]),
        (["x", "a/x"], ["{here}/x", "a/x"]),
    ],
)
def test_names_tell_runs_apart(paths: list[str], names: list[str]) -> None:
    found = short_names(paths)
    assert list(found) == list(dict.fromkeys(path.rstrip("/") for path in paths))
    for name, expected in zip(found.values(), names, strict=True):
        assert name.endswith(expected.replace("{here}/", "/"))
    assert len(set(found.values())) == len(found)
