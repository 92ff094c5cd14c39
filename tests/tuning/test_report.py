"""The report's numbers against direct computation, on planted sweeps in every state."""

from __future__ import annotations

import json
from html import unescape
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from distrec.cli import main
from distrec.data.storage import open_folder
from distrec.tuning.report import page, plots, report
from distrec.tuning.report.gather import gather
from distrec.tuning.report.parallel import axis
from distrec.tuning.report.pictures import read_items, thumbnail
from distrec.tuning.report.statistics import holm, importance, mean_per_user, over_seeds, paired_difference
from tests.tuning.planted_sweeps import ITEMS, METRICS, NINE, TWO, picture, plant, plant_data, write_trial


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return plant_data(str(tmp_path_factory.mktemp("planted") / "data"))


def entry(found: dict[str, Any], label: str) -> dict[str, Any]:
    return next(one for one in found["entries"] if one["label"] == label)


@pytest.mark.parametrize("seeds", [2, 3, 7])
def test_an_interval_covers_the_mean_in_95_of_100_draws(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    draws = [over_seeds((5 + 2 * rng.normal(size=seeds)).tolist()) for _ in range(2000)]
    covered = np.mean([one["low"] <= 5 <= one["high"] for one in draws])
    assert 0.935 <= covered <= 0.965
    assert draws[0]["seeds"] == seeds


def test_one_seed_has_a_mean_and_no_interval() -> None:
    assert over_seeds([0.25]) == {"mean": 0.25, "sd": None, "low": None, "high": None, "seeds": 1}


def test_a_paired_difference_is_that_of_the_users_in_both_and_of_the_t_test() -> None:
    rng = np.random.default_rng(3)
    mine, other = (np.array([1, 4, 6, 9, 12]), rng.normal(size=5)), (np.array([0, 4, 6, 9, 12, 20]), rng.normal(size=6))
    found = paired_difference(mine, other)
    test = stats.ttest_rel(mine[1][1:], other[1][1:5])
    assert found is not None
    assert found["users"] == 4
    np.testing.assert_allclose(found["mean"], (mine[1][1:] - other[1][1:5]).mean())
    np.testing.assert_allclose(found["p"], test.pvalue)
    np.testing.assert_allclose([found["low"], found["high"]], test.confidence_interval())


def test_a_paired_difference_without_spread_is_zero_and_without_users_none() -> None:
    users, values = np.arange(3), np.ones(3)
    assert paired_difference((users, values), (users, values)) == {
        "mean": 0.0,
        "low": 0.0,
        "high": 0.0,
        "p": 1.0,
        "users": 3,
    }
    assert paired_difference((users, values), (users + 2, values)) is None


def test_seeds_are_averaged_per_user_over_the_users_that_all_have() -> None:
    users, means = mean_per_user(
        [(np.array([1, 2, 5]), np.array([0.0, 1.0, 0.5])), (np.array([2, 5]), np.array([0.0, 1.0]))]
    )
    assert users.tolist() == [2, 5]
    assert means.tolist() == [0.5, 0.75]


def test_holm_steps_down_and_keeps_the_order() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_importance_finds_what_a_value_depends_on() -> None:
    rng = np.random.default_rng(0)
    trials = [{"lr": float(rng.random()), "layers": int(rng.integers(1, 4)), "same": 3} for _ in range(200)]
    by_lr = importance(trials, [trial["lr"] ** 3 for trial in trials])
    assert [(row["parameter"], row["kind"]) for row in by_lr] == [("lr", "range"), ("layers", "choices")]
    assert by_lr[0]["share"] == pytest.approx(1)
    by_layers = importance(trials, [(trial["layers"] - 2) ** 2 for trial in trials])  # no rank correlation at all
    assert by_layers[0]["parameter"] == "layers"
    assert by_layers[0]["share"] == pytest.approx(1)


@pytest.mark.parametrize(("name", "kind"), [("lr", "range"), ("layers", "choices")])
def test_the_chance_level_is_the_mean_share_of_a_parameter_without_effect(name: str, kind: str) -> None:
    rng = np.random.default_rng(1)
    shares, chances = [], []
    for _ in range(500):
        trials = [{"lr": float(rng.random()), "layers": number % 3} for number in range(8)]
        row = next(row for row in importance(trials, rng.normal(size=8).tolist()) if row["parameter"] == name)
        assert row["kind"] == kind
        shares.append(row["share"])
        chances.append(row["chance"])
    assert np.mean(shares) == pytest.approx(np.mean(chances), abs=0.03)


def test_importance_is_silent_where_it_would_mislead() -> None:
    values = [{"a": number, "b": f"own {number}"} for number in range(6)]
    assert importance(values[:3], [1.0, 2.0, 3.0]) == []
    assert importance(values, [0.5] * 6) == []
    assert [row["parameter"] for row in importance(values, [1.0, 5.0, 2.0, 4.0, 3.0, 6.0])] == ["a"]


def test_axes_place_numbers_by_size_or_logarithm_and_choices_in_steps() -> None:
    assert axis([1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])[0] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert axis([10, 11, 12, 14, 16, 20])[0] == pytest.approx([0, 0.1, 0.2, 0.4, 0.6, 1])
    assert axis([64, 32, 512])[0] == [0.5, 0.0, 1.0]
    assert axis([0.4, 0.1, 0.2], by_size=True)[0] == pytest.approx([1, 0, 1 / 3])
    assert axis([0.4, 0.4], by_size=True) == ([0.0, 0.0], [(0.0, "0.4")])
    assert axis([[5, 1], None, True])[1] == [(0.0, "[5, 1]"), (0.5, "none"), (1.0, "true")]


def test_colours_stand_out_from_their_page() -> None:
    def luminance(colour: str) -> float:
        parts = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    assert all(contrast(colour, plots.PAPER) >= 3 for colour in plots.LIGHT_COLOURS)
    assert all(contrast(colour, plots.DARK[plots.PAPER]) >= 3 for colour in plots.DARK_COLOURS)
    assert all(
        one != other for palette in (plots.LIGHT_COLOURS, plots.DARK_COLOURS) for one, other in combinations(palette, 2)
    )


def test_the_report_of_a_finished_sweep_agrees_with_its_files(tmp_path: Path, data: str) -> None:
    folder = plant(str(tmp_path / "sweep"), data, NINE)
    found = report(str(folder))
    assert json.loads(folder.read_bytes("report.json")) == found
    assert found["sweep"]["state"] == "done"
    tests: dict[str, list[np.ndarray]] = {}
    for one in NINE:
        told, runs = entry(found, one.label), [f"{one.label}-seed{seed}" for seed in (1001, 1002, 1003)]
        summaries = [folder.read_json("final", run, "summary.json") for run in runs]
        for metric in METRICS:
            values = [summary["test"][metric] for summary in summaries]
            assert told["test"][metric]["mean"] == pytest.approx(np.mean(values))
            half = (
                stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))[1] - np.mean(values)
                if np.std(values)
                else 0
            )
            assert told["test"][metric]["high"] - told["test"][metric]["mean"] == pytest.approx(half)
        files = [pq.read_table(folder.at("final", run, "evaluation", "test-users.parquet")) for run in runs]
        tests[one.label] = [file["recall@20"].to_numpy() for file in files]
        trials = [
            folder.read_json("trials", name, "trial.json")
            for name in folder.names("trials")
            if name.startswith(f"{one.label}-")
        ]
        assert sum(told["counts"].values()) == len(trials) == 6
        assert told["cost"]["search_cpu_hours"] == pytest.approx(sum(t["seconds"] * t["cpus"] for t in trials) / 3600)
        assert told["winner"] == told["best"]
        if told["progress"]:
            values = [value for _, value in told["progress"]]
            assert values == sorted(values)
            assert values[-1] == max(trial["value"] for trial in told["trials"] if trial["finished"])
    valid = {one.label: entry(found, one.label)["valid"]["recall@20"]["mean"] for one in NINE}
    assert found["baseline"] == max(
        (one.label for one in NINE if not one.reads_content), key=lambda label: valid[label]
    )
    assert found["choice"] == max(valid, key=lambda label: valid[label])
    mean = {label: np.mean(values, axis=0) for label, values in tests.items()}
    corrected = {}
    for label in tests.keys() - {found["baseline"]}:
        gap = entry(found, label)["difference"]
        test = stats.ttest_rel(mean[label], mean[found["baseline"]])
        assert gap["p"] == pytest.approx(test.pvalue)
        assert gap["mean"] == pytest.approx((mean[label] - mean[found["baseline"]]).mean())
        corrected[label] = gap["p"]
    assert {label: entry(found, label)["difference"]["holm"] for label in corrected} == holm(corrected)
    assert entry(found, found["baseline"])["difference"] is None
    means = [entry(found, label)["test"]["recall@20"]["mean"] for label in found["order"]]
    assert means == sorted(means, reverse=True)
    assert "items.unseen" not in entry(found, "odmt")["slices"]
    assert {label for user in found["examples"] for label in user["recommended"]} == {one.label for one in NINE}
    written = folder.read_bytes("report.md").decode()
    assert "chosen on the validation split only" in written
    assert "distrec train " in written
    assert all(one.title in written for one in NINE)


def test_a_trial_that_was_stopped_counts_and_one_that_failed_does_not(tmp_path: Path, data: str) -> None:
    folder = plant(str(tmp_path / "sweep"), data, NINE)
    found = gather(str(folder))
    mentor, odmt = entry(found, "mentor"), entry(found, "odmt")
    assert [trial["finished"] for trial in mentor["trials"]] == [True, False, True, True, False, True]
    assert [trial["value"] is not None for trial in mentor["trials"]] == [True] * 6  # measured before it failed
    assert odmt["counts"] == {"waiting": 0, "running": 0, "done": 3, "stopped": 3, "failed": 0}
    assert all(trial["finished"] for trial in odmt["trials"])
    assert entry(found, "popularity")["trials"][0]["value"] == 0.063
    assert entry(found, "popularity")["trials"][0]["curve"] == []


@pytest.mark.parametrize("state", ["searching", "finishing"])
def test_an_unfinished_sweep_shows_what_has_been_measured(tmp_path: Path, data: str, state: str) -> None:
    folder = plant(str(tmp_path / "sweep"), data, TWO, state=state)
    found = report(str(folder))
    written = folder.read_bytes("report.md").decode()
    assert found["sweep"]["state"] == state
    assert found["baseline"] is None
    assert found["choice"] == "odmt"
    assert "What is missing" in written
    if state == "searching":
        assert "The search is still running" in written
        assert "optimistic" in written
        assert "test Recall" not in written
    else:
        assert entry(found, "odmt")["test"]
        assert entry(found, "lightgcn")["test"] == {}
        assert found["order"] == ["odmt", "lightgcn"]
        assert "LightGCN: no finished run with a fresh seed" in written


def test_torn_and_absent_files_are_named_and_leave_the_rest(tmp_path: Path, data: str) -> None:
    folder = plant(str(tmp_path / "sweep"), data, TWO)
    whole = gather(str(folder))
    folder.write_bytes(
        folder.read_bytes("trials", "odmt-001", "metrics.jsonl")[:-40], "trials", "odmt-001", "metrics.jsonl"
    )
    folder.write_bytes(b"{", "final", "odmt-seed1002", "summary.json")
    folder.write_bytes(b"PAR1", "final", "odmt-seed1001", "evaluation", "test-users.parquet")
    folder.remove("final", "lightgcn-seed1003", "evaluation")
    folder.remove("winners", "lightgcn.yaml")
    folder.write_json({"id": "stray", "entry": 3}, "trials", "stray", "trial.json")
    folder.fs.makedirs(folder.at("trials", "odmt-099"))
    found = report(str(folder))
    assert found["unreadable"] == [
        "final/odmt-seed1001/evaluation/test-users.parquet",
        "final/odmt-seed1002/summary.json",
        "trials/odmt-001/metrics.jsonl",
        "trials/stray/trial.json",
    ]
    assert len(entry(found, "odmt")["trials"][1]["curve"]) == len(entry(whole, "odmt")["trials"][1]["curve"]) - 1
    assert entry(found, "odmt")["test"]["recall@20"]["seeds"] == 2
    assert entry(found, "odmt")["difference"]["users"] == 100  # from the only seed whose file is whole
    assert entry(found, "lightgcn")["slices"]["items.cold"]["metrics"]["recall@20"]["seeds"] == 2
    written = folder.read_bytes("report.md").decode()
    assert "LightGCN: the winner's config file is missing" in written
    assert "Could not be read: final/odmt-seed1001" in written


def test_a_trial_of_the_base_config_has_the_values_of_its_run(tmp_path: Path, data: str) -> None:
    folder = plant(str(tmp_path / "sweep"), data, TWO)
    whole = entry(gather(str(folder)), "odmt")
    name = "odmt-002"
    record = folder.read_json("trials", name, "trial.json")
    values = record["values"]
    folder.write_json({**record, "values": {}}, "trials", name, "trial.json")
    assert entry(gather(str(folder)), "odmt")["trials"][2]["values"] == {}  # not recorded, and not guessed
    config = {"optimizer": {"lr": values["optimizer.lr"], "name": "adam"}, "method": {"alpha": values["method.alpha"]}}
    folder.write_bytes(json.dumps(config).encode(), "trials", name, "config.yaml")
    assert entry(gather(str(folder)), "odmt") == whole


def test_a_run_that_still_trains_has_no_test_values(tmp_path: Path, data: str) -> None:
    folder = plant(str(tmp_path / "sweep"), data, TWO, seeds=1)
    write_trial(
        folder,
        "final",
        "odmt-seed1002",
        {"entry": "odmt", "seed": 1002, "status": "running", "seconds": 36.0, "cpus": 1.0},
        [],
    )
    odmt = entry(gather(str(folder)), "odmt")
    assert [seed["status"] for seed in odmt["seeds"]] == ["done", "running"]
    assert odmt["test"]["recall@20"] == {**odmt["test"]["recall@20"], "seeds": 1, "low": None}
    assert odmt["cost"]["final_cpu_hours"] == pytest.approx((600 * 1.4 * 2 + 36) / 3600)


def test_a_single_seed_and_a_single_trial_say_so(tmp_path: Path, data: str) -> None:
    folder = plant(str(tmp_path / "sweep"), data, NINE, trials=1, seeds=1)
    found = report(str(folder))
    written = folder.read_bytes("report.md").decode()
    assert "one seed, so there is no interval" in written
    assert "±" not in written.split("## How choices were made")[0].split("Rows are in order")[0]
    assert all(one["importance"] == [] for one in found["entries"])
    assert "all trials had the same settings" in written


def test_published_values_are_shown_only_if_the_sweep_gives_them(tmp_path: Path, data: str) -> None:
    value = {"entry": "lightgcn", "source": "table 4", "metrics": {"recall@20": 0.2345}, "note": ""}
    plant(str(tmp_path / "with"), data, TWO, published=[value])
    plant(str(tmp_path / "without"), data, TWO)
    for name, there in (("with", True), ("without", False)):
        report(str(tmp_path / name))
        written = (tmp_path / name / "report.md").read_text()
        assert ("0.2345" in written) == there
        assert ("No published value" in written) != there


def test_a_folder_without_a_sweep_is_refused_in_one_sentence(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "sweep.yaml").write_text("just words")
    empty = plant(str(tmp_path / "empty"), data, TWO, trials=0)
    lost = plant(str(tmp_path / "lost"), data, NINE[2:3], trials=3)
    lost.remove("trials", "mentor-000")
    lost.remove("trials", "mentor-002")
    for name, expected in (
        ("absent", "holds no sweep (no sweep.yaml, nothing is there)"),
        ("full", "holds no sweep (no sweep.yaml, another folder's content is there)"),
        ("odd", "that can be read (sweep.yaml: it holds no keys and values)"),
        (empty.path, "has no finished trial (none has started)"),
        (lost.path, "has no finished trial (1 failed; the first failure: loss 'bpr' is NaN at step 7)"),
    ):
        assert main(["report", str(tmp_path / name)]) == 2
        told = capsys.readouterr().err
        assert expected in told
        assert told.startswith("distrec report: ")
        assert told.count("\n") == 1
        assert not (tmp_path / name / "report.html").exists()


def test_the_terminal_shows_paths_and_leaderboard(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = plant(str(tmp_path / "sweep"), data, TWO)
    assert main(["report", str(folder), "--no-examples"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [f"{folder}/report.{kind}" for kind in ("html", "md", "json")]
    assert [line.split()[0] for line in lines[4:]] == ["method", "ODMT", "LightGCN"]
    for kind in ("html", "md", "json"):
        shown = folder.read_bytes(f"report.{kind}").decode()
        assert "data:image/jpeg" not in shown
        assert "A rather long title" not in shown
        assert "users' histories and recommendations, items' titles and pictures" in unescape(shown)
    assert folder.read_json("report.json")["examples"] == []


def test_without_the_dataset_items_have_titles_and_the_page_says_why_there_are_no_pictures(tmp_path: Path) -> None:
    data = plant_data(str(tmp_path / "data"))
    folder = plant(str(tmp_path / "sweep"), data, TWO)
    report(str(folder))
    shown = folder.read_bytes("report.html").decode()
    assert "data:image/jpeg" in shown
    assert "6 of the 60 items shown have no picture" in shown
    assert "<b>& 1</b>" not in shown.split("<main>")[1].split("<script")[0]  # titles are text
    plant_data(data, pictures=False)
    report(str(folder))
    assert "has changed since the sweep" in folder.read_bytes("report.html").decode()
    open_folder(data).remove()
    report(str(folder))
    gone = folder.read_bytes("report.html").decode()
    assert "can no longer be read" in gone
    assert "Thing &lt;b&gt;&amp; 15" in gone  # the runs recorded the titles


def test_every_item_shown_has_its_own_title_and_picture(tmp_path: Path, data: str) -> None:
    folder = plant(str(tmp_path / "sweep"), data, TWO)
    items = read_items(gather(str(folder)))
    assert items.titles.keys() == set(range(ITEMS))
    assert all(f"{number}</b>" in title for number, title in items.titles.items())
    assert items.pictures == {number: thumbnail(picture(number)) for number in range(ITEMS) if number % 10}
    assert thumbnail(b"no picture") is None


def test_a_report_needs_nothing_but_its_file(tmp_path: Path, data: str) -> None:
    folder = plant(str(tmp_path / "sweep"), data, TWO)
    report(str(folder))
    own = folder.read_bytes("report.html").decode().replace(page.get_plotlyjs(), "")
    assert "http:" not in own
    assert "https:" not in own
    assert "src=" not in own


@pytest.mark.multiprocess
def test_a_sweep_on_an_object_store_is_read_and_its_report_written_there(s3: str) -> None:
    data = plant_data(f"{s3}/data")
    folder = plant(f"{s3}/sweep", data, TWO, trials=4, seeds=2)
    found = report(f"{s3}/sweep")
    assert folder.read_json("report.json") == found
    assert entry(found, "odmt")["difference"]["users"] == 100
    html = folder.read_bytes("report.html").decode()
    assert "data:image/jpeg" in html
    assert "distrec train odmt.yaml" in html  # a config is read from a local file
