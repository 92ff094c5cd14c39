"""Plans: extrapolation, bad input, what is printed, and a prediction against the peak of a real run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distrec.cli import main
from distrec.config.run import RunConfig
from distrec.data.dataset import Dataset
from distrec.data.manifest import FeatureEntry
from distrec.data.synth import GraphSize, write_graph
from distrec.errors import InputError
from distrec.sizing import likeness, worker_bytes
from distrec.sizing import plan as planning
from distrec.sizing.likeness import add_features, share_of, write_likeness
from distrec.sizing.plan import Needs, plan, rehearsed_share
from distrec.sizing.rehearsal import Rehearsal
from distrec.sizing.words import bytes_of, machines, per_machine, plan_text, remedy
from tests.methods import bare

USERS, ITEMS = 60, 40


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    train = [(user, (user + shift) % ITEMS) for user in range(USERS) for shift in range(6)]
    held_out = [(user, (user + 7) % ITEMS) for user in range(USERS)]
    features = {"text": np.random.default_rng(0).normal(size=(ITEMS, 6))}
    return bare.write(tmp_path_factory.mktemp("data") / "d", USERS, ITEMS, train, features, held_out)


def config(data: str, method: dict[str, Any], **sections: Any) -> RunConfig:
    return bare.run_config(method, **{"data": data, "train": {"workers": 0, "epochs": 2}, **sections})


def made(workers: int = 2, peak: int = 1000, held: dict[str, int] | None = None, **fields: Any) -> Needs:
    phases = {"process": 100, "build": 200, "steps": peak}
    known = {"share": 1.0, "received": 5, "checkpoint": 10**9, "step_seconds": 0.5, "steps": 72}
    return Needs(workers=workers, held=held or {"tables": 50}, phases=phases, peak=peak, **known | fields)


def linear(batch_counts: list[int]) -> Any:
    """A rehearsal whose numbers are linear in the dataset's rows."""

    def rehearse(config: RunConfig, workers: int, steps: int) -> Rehearsal:
        counted = Dataset.open(config.data, checked=True)
        rows = counted.manifest.interactions["train"]
        batch_counts.append(config.train.global_batch)
        phases = {"process": 1000, "build": 1000 + 3 * counted.users, "steps": 1000 + 5 * rows + 2 * counted.items}
        return Rehearsal(phases, {"graphs": 7 * rows}, rows, [0.0, 1e-3 * rows, 1e-3 * rows], rows // 64)

    return rehearse


def test_what_is_linear_in_the_rows_is_extrapolated_to_the_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "d")
    whole = write_graph(out, GraphSize(4000, 2000, 80_000, 1, 1))
    batches: list[int] = []
    monkeypatch.setattr(planning, "rehearse", linear(batches))
    monkeypatch.setattr(planning, "_MOST_ROWS", whole.manifest.interactions["train"] / 4)
    (found,) = plan(config(out, {"name": "bprmf", "dim": 4}, train={"workers": 2, "global_batch": 64}))
    rows = whole.manifest.interactions["train"]
    assert found.share == pytest.approx(1 / 4)
    assert batches == [64, 64]
    assert found.peak == pytest.approx(1000 + 5 * rows + 2 * 2000, rel=0.01)
    assert found.held["graphs"] == pytest.approx(7 * rows, rel=0.01)
    assert found.received == pytest.approx(rows, rel=0.01)
    assert found.steps == pytest.approx(rows / 64, rel=0.01)
    # a batch with more rows than a smaller dataset has is made smaller too
    (found,) = plan(config(out, {"name": "bprmf", "dim": 4}, train={"workers": 2, "global_batch": 32_000}))
    assert batches[2:] == [8000, 4000]


@pytest.mark.parametrize("users", [100, 10_000, 1_000_000, 100_000_000])
def test_only_what_is_large_is_not_rehearsed_with_itself(users: int, data: str) -> None:
    manifest = Dataset.open(data).manifest.model_copy(update={"users": users, "items": users // 3})
    share = rehearsed_share(manifest, 1664, 1000 * users)
    assert (share == 1) == (users <= 10_000)
    assert 0 < share <= rehearsed_share(manifest, 0, 0) <= 1


def shared(whole: int, every: int) -> Any:
    """A rehearsal in which workers share `whole` bytes, and each needs `every` more."""
    return lambda config, workers, steps: Rehearsal({"steps": every + whole // max(workers, 1)}, {}, 0, [0.0], 1)


@pytest.mark.parametrize(
    ("machine", "batch", "tried"),
    [
        (2000, 64, [0]),
        (600, 64, [0, 2]),
        (150, 64, [0, 2, 4, 8, 16, 32]),
        (150, 8, [0, 2, 4, 8]),  # a worker needs a row of the batch
        (90, 1 << 16, [0, 2, 4, 8, 16, 32, 64, 128, 256]),  # 200 more bytes are never saved
    ],
)
def test_more_workers_are_tried_until_one_fits_a_machine(
    machine: int, batch: int, tried: list[int], data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "rehearse", shared(1000, 100))
    names = "tables", "dense module", "checkpoint being written", "metrics of all users"
    monkeypatch.setattr(planning, "worker_parts", lambda *_: dict.fromkeys(names, 0))
    run = config(data, {"name": "popularity"}, train={"workers": 0, "global_batch": batch})
    found = planning.until_it_fits(run, plan(run), machine)
    assert [one.workers for one in found] == tried


def test_a_likeness_has_the_shapes_of_what_it_is_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {
        "text": FeatureEntry(width=7, dtype="float32", missing=3, source="a.npy", parts=["x"]),
        "image-tokens": FeatureEntry(tokens=3, width=5, dtype="float16", missing=0, source="b.npy", parts=["x"]),
    }
    manifest = Dataset.open(bare.write(tmp_path / "x", 400, 300, [(0, 0)], {})).manifest
    manifest = manifest.model_copy(update={"features": entries, "interactions": {"train": 4000, "valid": 400}})
    small = write_likeness(str(tmp_path / "small"), manifest, share_of(manifest, 0.5))
    assert (small.users, small.items, sum(small.manifest.interactions.values())) == (200, 150, 2200)
    assert small.feature_rows("text", 0, 150)[0].shape == (150, 7)
    values, count, missing = small.token_rows("image-tokens", 10, 20)
    assert values.shape == (10, 3, 5)
    assert count.tolist() == [3] * 10
    assert not missing.any()
    assert small.feature("text").dtype == "float32"
    add_features(str(tmp_path / "small"), {})
    with monkeypatch.context() as patch:
        patch.setattr(likeness, "MOST_SCORES", 200 * 150 / 6.5)
        fewer = write_likeness(str(tmp_path / "fewer"), manifest, share_of(manifest, 0.5))
    for split in ("valid", "test"):
        rows, every = fewer.interactions(split), small.interactions(split)
        assert rows.user.tolist() == every.user[every.user % 7 == 0].tolist()
        assert fewer.manifest.interactions[split] == len(rows) > 0
    assert fewer.interactions("train").item.tolist() == small.interactions("train").item.tolist()
    assert not Dataset.open(str(tmp_path / "small")).manifest.features


@pytest.mark.parametrize(
    ("text", "size"),
    [("16Gi", 16 << 30), ("1.5G", 1_500_000_000), ("512Mi", 512 << 20), ("1000", 1000), ("2k", 2000), ("1Ti", 1 << 40)],
)
def test_quantities_are_read_as_in_kubernetes(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "16GB", "-1Gi", "Gi", "1 Gi", "0", "1e3", "0.1", "9" * 40])
def test_other_quantities_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"option '--machine-memory' is .*; give a quantity such as 16Gi or 16G"):
        bytes_of(text)


@pytest.mark.parametrize(
    ("workers", "peak", "fitting", "count"), [(0, 1000, 1, 1), (5, 400, 2, 3), (4, 250, 4, 1), (2, 1001, 0, 0)]
)
def test_workers_are_put_on_machines(workers: int, peak: int, fitting: int, count: int) -> None:
    found = made(workers, peak)
    assert (per_machine(found, 1000), machines(found, 1000)) == (fitting, count)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (made(peak=1000, held={"features and other arrays of the method": 700}), "narrower vectors"),
        (made(peak=1000, held={"tables": 10, "dense module": 800}), "dense.zero_stage"),
        (made(peak=1000, held={"tables": 10}), "train.global_batch"),
        (made(peak=210, held={"tables": 1}), "graphs and features are built"),
    ],
)
def test_the_remedy_is_about_the_largest_part(found: Needs, words: str) -> None:
    assert words in remedy(found)


def test_the_text_has_a_column_for_each_number_of_workers(data: str) -> None:
    run = config(data, {"name": "bprmf"})
    text = plan_text([made(1, 2000), made(2, 1200)], run, 100, 1500, probed=True)
    row = next(line for line in text.splitlines() if line.startswith("  machines"))
    assert row.split() == ["machines", "does", "not", "fit", "2"]
    assert "to fit" not in text  # with two workers it does
    assert "10.0" in text  # seconds for a checkpoint of 1 GB
    assert "0.01" in text  # hours of an epoch
    assert "to fit: " in plan_text([made(1, 2000)], run, 100, 1500, probed=False)
    assert "1/20 and 1/40" in plan_text([made(share=0.05)], run, 100, None, probed=False)


def refusals(data: str) -> list[tuple[Sequence[str], str]]:
    bprmf = ["method.name=bprmf"]
    return [
        ([*bprmf, f"data={data}-not-there"], "has no manifest.json"),
        (["method.name=alignrec", "method.features=[image]"], "has no feature 'image'"),
        (["method.name=odmt"], "run 'distrec encode .* --tokens'"),
        ([*bprmf, "--workers", "0", "9999999"], "option '--workers' is 9999999"),
        ([*bprmf, "train.global_batch=2", "--workers", "3"], "'train.global_batch' is 2 but there are 3 workers"),
        ([*bprmf, "--storage-rate", "0"], "option '--storage-rate' is 0"),
        ([*bprmf, "--machine-memory", "lots"], "option '--machine-memory' is 'lots'"),
        (["method.name=nothing"], "'method.name' is 'nothing'"),
    ]


@pytest.mark.parametrize("case", range(8))
def test_bad_input_is_refused_before_anything_is_rehearsed(
    case: int, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "rehearse", lambda *_: pytest.fail("a rehearsal began"))
    file = tmp_path / "run.yaml"
    file.write_text(f"data: {data}\nrun: {{name: r}}\nmethod: {{name: bprmf}}\n")
    arguments, message = refusals(data)[case]
    assert main(["plan", str(file), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("distrec plan: ")
    assert error.count("\n") == 1
    assert re.search(message, error)


@pytest.mark.multiprocess
def test_a_refusal_in_a_rehearsal_is_the_runs_own(tmp_path: Path) -> None:
    pairs = [(0, item) for item in range(12)]  # one user has all items, so that no negative exists
    whole = bare.write(tmp_path / "d", 1, 12, pairs, {})
    with pytest.raises(InputError, match="so no negative can be drawn"):
        worker_bytes(config(whole, {"name": "bprmf"}))


@pytest.mark.multiprocess
def test_a_prediction_agrees_with_the_peak_of_a_run(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "d"
    entries = {"text": FeatureEntry(width=256, dtype="float16", missing=0, source="a", parts=[])}
    manifest = Dataset.open(data).manifest.model_copy(
        update={"users": 6000, "items": 4000, "interactions": {"train": 90_000}, "features": entries}
    )
    write_likeness(str(out), manifest, share_of(manifest, 1))
    file = tmp_path / "run.yaml"
    file.write_text(
        f"data: {out}\nrun: {{name: r, storage: {tmp_path}/runs}}\nmethod: {{name: alignrec, features: [text]}}\n"
        "train: {workers: 0, epochs: 2, global_batch: 8192}\n"
    )
    capsys.readouterr()
    assert main(["plan", str(file), "--json", "--workers", "0", "3", "--machine-memory", "8Gi"]) == 0
    alone, three = json.loads(capsys.readouterr().out)
    # The shell stands between: a process inherits the peak of the one that it is started from.
    train = f"'{sys.executable}' -m distrec.cli train '{file}'; exit $?"
    subprocess.run(["sh", "-c", train], check=True, capture_output=True, timeout=300)
    summary = json.loads((tmp_path / "runs/r/summary.json").read_text())
    process, peak = alone["phases"]["process"], summary["peak_memory_bytes"]
    assert alone["peak"] == pytest.approx(peak, rel=0.15)
    assert alone["peak"] - process == pytest.approx(peak - process, rel=0.5)
    assert [alone["workers"], three["workers"], alone["share"]] == [0, 3, 1]
    for name in ("tables", "graphs", "moments of tables", "features and other arrays of the method"):
        assert three["held"][name] < alone["held"][name]
    assert three["held"]["interactions"] == alone["held"]["interactions"]
    assert three["phases"]["process"] > process  # Ray comes on top
    assert three["peak"] - three["phases"]["process"] < peak - process
    assert (alone["received"], three["received"] > 0) == (0, True)
    assert alone["checkpoint"] == three["checkpoint"] > 3 * 4 * 64 * 10_000
    assert alone["machines"] == three["machines"] == 1
    assert list(alone["phases"].values()) == sorted(alone["phases"].values())
