"""What the report says about the length of training, the rule of the ranking, slices and examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distrec.data.storage import Folder
from distrec.evaluation.ending import ENDING
from distrec.tuning.report import report, tables, words
from distrec.tuning.report.gather import gather
from tests.tuning.planted_sweeps import METRICS, NINE, TWO, USERS, plant, plant_data

STILL = {"end": "epochs", "best_is_last": True, "evaluations_since_best": 0}
PATIENCE = {"end": "patience", "best_is_last": False, "evaluations_since_best": 7}
WHOLE = {"end": "epochs", "best_is_last": False, "evaluations_since_best": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return plant_data(str(tmp_path_factory.mktemp("planted") / "data"), pictures=False)


def change(folder: Folder, *parts: str, **fields: Any) -> None:
    """Set fields of a JSON object, which need not exist."""
    tree = folder.read_json(*parts) if folder.exists(*parts) else {}
    folder.write_json({**tree, **fields}, *parts)


@pytest.mark.parametrize(
    ("endings", "cell", "improving"),
    [
        ([STILL, STILL], "still improving at the last evaluation", 2),
        ([PATIENCE, PATIENCE], "stopped by patience after 7 evaluations without improvement", 0),
        ([WHOLE, WHOLE], "all epochs trained", 0),
        ([WHOLE, STILL], "all epochs trained (1 of 2), still improving at the last evaluation (1 of 2)", 1),
        ([{"end": None}, {"end": None}], tables.NOTHING, 0),
    ],
)
def test_it_says_how_the_training_of_the_winners_ended(
    tmp_path: Path, data: str, endings: list[dict[str, Any]], cell: str, improving: int
) -> None:
    folder = plant(str(tmp_path / "sweep"), data, TWO, trials=1, seeds=2)
    for label in ("odmt", "lightgcn"):
        for seed, ending in enumerate(endings, 1001):
            change(folder, "final", f"{label}-seed{seed}", "summary.json", **(ending if label == "odmt" else WHOLE))
    found = report(str(folder))
    (row,) = (row for row in tables.training(found).rows if row[0] == "ODMT")
    assert row == ["ODMT", "2 fresh seeds", "12, 12", "12, 12", cell]
    sentence = f"Still improving at the last evaluation: ODMT ({improving} of 2 runs). More epochs"
    assert (sentence in " ".join(words.answer(found))) == (improving > 0)
    assert found["choice"] == "odmt"
    written = folder.read_bytes("report.md").decode()
    assert written.count(sentence) == 2 * (improving > 0)  # with the answer and below the leaderboard
    assert f"| **{cell}** |" in written


def test_it_says_how_the_training_of_trials_ended(tmp_path: Path, data: str) -> None:
    folder = plant(str(tmp_path / "sweep"), data, NINE[1:2], trials=4, state="searching")  # stopped, done, stopped, …
    trained = {key: 60 for key in ENDING}
    change(folder, "trials", "odmt-001", "summary.json", **{**trained, **STILL})
    change(folder, "trials", "odmt-002", "summary.json", **{**trained, **STILL})  # of a pause, before it was stopped
    change(folder, "trials", "odmt-003", "summary.json", **{**trained, **PATIENCE})
    found = gather(str(folder))
    (entry,) = found["entries"]
    assert [trial["end"] for trial in entry["trials"]] == [None, "epochs", None, "patience"]
    for trial in entry["trials"][::2]:  # without an end, the curve tells
        assert trial["best_is_last"] == (trial["epoch"] == trial["curve"][-1][0])
    status = {row[0].partition(",")[0]: row[-1] for row in tables.trials(found, entry).rows}
    assert status == {
        "0": "stopped: asha at epoch 4",
        "1": "done, still improving at the last evaluation",
        "2": "stopped: asha at epoch 4, restarted 1 time",
        "3": "done, stopped by patience after 7 evaluations without improvement",
    }
    (row,) = tables.training(found).rows
    assert row[1] == "best trial"


def test_it_names_mask_and_users(tmp_path: Path, data: str) -> None:
    found = report(str(plant(str(tmp_path / "sweep"), data, TWO, trials=1, seeds=1)))
    assert found["sweep"]["users"] == {"valid": USERS, "test": USERS // 2}
    told = " ".join(words.protocol(found))
    assert "(mask train)" in told
    assert f"Values are means over users: {USERS} users on valid, {USERS // 2} users on test." in told


def test_slices_show_the_same_metrics_for_every_method(tmp_path: Path, data: str) -> None:
    folder = plant(str(tmp_path / "sweep"), data, NINE, trials=1, seeds=1)
    found = gather(str(folder))
    shown = tables.slices(found)
    assert [table.head[0] for table in shown] == ["Recall@20", "NDCG@20", "Hit rate@20"]
    for table, metric in zip(shown, ("recall@20", "ndcg@20", "hit@20"), strict=True):
        assert metric in METRICS
        assert table.head[2:] == [words.display_names(found)[label] for label in found["order"]]
        for row in table.rows:
            part = row[0].partition(":")[0]
            for label, cell in zip(found["order"], row[2:], strict=True):
                evaluated = folder.read_json("final", f"{label}-seed1001", "evaluation", "test.json")["slices"]
                assert cell == f"{evaluated[part]['metrics'][metric]:.4f}"


def test_examples_come_with_ids_and_titles(tmp_path: Path, data: str) -> None:
    folder = plant(str(tmp_path / "sweep"), data, TWO, trials=1, seeds=1)
    found = gather(str(folder))
    listed = {item for user in found["examples"] for items in (user["history"], user["held_out"]) for item in items}
    listed |= {item for user in found["examples"] for items in user["recommended"].values() for item in items}
    assert [item["item"] for item in found["items"]] == sorted(listed)
    assert all(item["id"] == f"i{item['item']}" and f" {item['item']}</b>" in item["title"] for item in found["items"])
    assert gather(str(folder), examples=False)["items"] == []


@pytest.mark.parametrize("content", [{"users": [{}]}, {"users": 3}, {"users": [[1]]}, {"users": [{"user": "x"}]}])
def test_examples_that_cannot_be_read_are_named(tmp_path: Path, data: str, content: Any) -> None:
    folder = plant(str(tmp_path / "sweep"), data, TWO, trials=1, seeds=1)
    name = "final/odmt-seed1001/evaluation/test-examples.json"
    folder.write_bytes(json.dumps(content).encode(), *name.split("/"))
    found = report(str(folder))
    assert found["unreadable"] == [name]
    assert {label for user in found["examples"] for label in user["recommended"]} == {"lightgcn"}
