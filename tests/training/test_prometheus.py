"""The gauges of a run on a Ray cluster, as Prometheus reads them, and the dashboard that shows them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray.util.metrics
from prometheus_client.parser import text_string_to_metric_families

from distrec.cli import main
from distrec.training import trackers
from distrec.training.prometheus import GAUGES, connected
from tests.ray_head import Head, end, ray_head
from tests.training import small

REPOSITORY = Path(__file__).resolve().parents[2]
DASHBOARD = REPOSITORY / "cluster/monitoring/grafana-dashboard.json"
WAIT = 150.0  # seconds; a busy host needs half a minute to start workers, and Ray collects numbers every few seconds

Served = dict[str, list[tuple[dict[str, str], float]]]


def served(head: Head) -> Served:
    """What the head's node serves: labels and value of each series, by the name of the metric."""
    try:
        with urllib.request.urlopen(head.metrics, timeout=30) as answer:
            text = answer.read().decode()
    except OSError:  # it starts after the dashboard
        return {}
    found: Served = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def wait_until(ready: Callable[[Served], bool], head: Head, run: subprocess.Popen[bytes]) -> Served:
    """What the node serves as soon as it is `ready`, while `run` trains."""
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        assert run.poll() is None, "the run has ended"
        if ready(found := served(head)):
            return found
        time.sleep(0.5)
    pytest.fail(f"not served in time; served are {sorted(name for name in found if 'distrec' in name)}")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("head"), 2, {**os.environ, "OMP_NUM_THREADS": "1"}) as started:
        yield started


@contextmanager
def training(config: str, head: Head) -> Iterator[subprocess.Popen[bytes]]:
    """A run that trains on the head's node until the block ends."""
    run = subprocess.Popen(
        [sys.executable, "-m", "distrec.cli", "train", config], cwd=REPOSITORY,
        env={**head.environment, "RAY_ADDRESS": head.cluster}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield run
    finally:
        end(run)


def workers(head: Head) -> list[psutil.Process]:
    """The workers of Ray Train on the head's node."""
    children = psutil.Process(head.process.pid).children(recursive=True)
    return [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]


def expressions() -> list[str]:
    """All Prometheus expressions of the dashboard."""
    board = json.loads(DASHBOARD.read_text())
    queries = [variable["query"] for variable in board["templating"]["list"] if variable["type"] == "query"]
    return [*queries, *(target["expr"] for panel in board["panels"] for target in panel["targets"])]


@pytest.mark.multiprocess
def test_a_run_on_a_cluster_is_served_and_the_dashboard_shows_what_is_served(tmp_path: Path, head: Head) -> None:
    data = small.write_small(tmp_path / "data")
    config = small.write_config(
        tmp_path / "run.yaml", data, tmp_path, "lightgcn",
        train={"workers": 2, "epochs": 100_000, "patience": 100_000, "global_batch": 16},
    )  # fmt: skip
    prefixed = {f"ray_{name}" for name in GAUGES}
    with training(config, head) as run:
        found = wait_until(lambda found: found.keys() >= prefixed and "ray_node_mem_used" in found, head, run)
        for name in prefixed:
            for labels, _ in found[name]:
                assert (labels["run"], labels["method"]) == ("run", "lightgcn")
        epoch = small.metrics(tmp_path / "run")[-1]
        assert {labels["term"] for labels, _ in found["ray_distrec_loss"]} == epoch["loss"].keys()
        assert {labels["metric"] for labels, _ in found["ray_distrec_validation"]} == epoch["valid"].keys()
        assert 1 <= only(found, "ray_distrec_epoch") <= epoch["epoch"] + 1
        assert 1 <= only(found, "ray_distrec_step") <= only(found, "ray_distrec_steps")
        assert only(found, "ray_distrec_epochs") == 100_000
        assert only(found, "ray_distrec_workers") == 2
        assert only(found, "ray_distrec_rows_per_second") > 0
        assert only(found, "ray_distrec_checkpoint_seconds") > 0
        assert 2e8 < only(found, "ray_distrec_peak_memory_bytes") < 4e9
        assert only(found, "ray_distrec_restarts") == 0

        used = {name for text in expressions() for name in re.findall(r"\bray_\w+", text)}
        assert used <= found.keys(), "the dashboard asks for what nobody serves"
        assert used >= prefixed, "the dashboard does not show everything"

        workers(head)[-1].kill()
        wait_until(lambda found: 1.0 in values(found, "ray_distrec_restarts"), head, run)
        run.send_signal(signal.SIGTERM)
        assert run.wait(WAIT) == 130


def values(found: Served, name: str) -> list[float]:
    return [value for _, value in found.get(name, [])]


def only(found: Served, name: str) -> float:
    (value,) = values(found, name)
    return value


def test_the_dashboard_is_a_dashboard() -> None:
    board = json.loads(DASHBOARD.read_text())
    assert board["uid"]
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 5
    assert len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells), "panels lie over each other"
    assert all(x < 24 for x, _ in cells)
    for text in expressions():
        assert text.count("(") == text.count(")")
        assert set(re.findall(r"\$(\w+)", text)) <= variables.keys()


def test_without_a_cluster_there_are_no_gauges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a gauge was made")

    monkeypatch.setattr(ray.util.metrics, "Gauge", never)
    assert not connected()
    data = small.write_small(tmp_path / "data")
    assert main(["train", small.write_config(tmp_path / "run.yaml", data, tmp_path)]) == 0
    assert "warnings" not in small.read(tmp_path / "run", "run.json")


def test_asking_for_a_cluster_does_not_import_ray() -> None:
    code = (
        "import sys; from distrec.training.prometheus import connected; sys.exit(connected() or 'ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60, cwd=REPOSITORY).returncode == 0


@pytest.mark.parametrize("broken", ["__init__", "set"])
def test_gauges_that_fail_end_no_run(tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fails(*_: Any, **__: Any) -> None:
        calls.append(broken)
        raise RuntimeError("no core worker")

    monkeypatch.setattr(ray.util.metrics.Gauge, broken, fails)
    monkeypatch.setattr(trackers, "connected", lambda: True)
    data = small.write_small(tmp_path / "data")
    assert main(["train", small.write_config(tmp_path / "run.yaml", data, tmp_path)]) == 0
    assert len(calls) == 1  # then it is off
    (warning,) = small.read(tmp_path / "run", "run.json")["warnings"]
    assert warning.startswith("Prometheus is off for the rest of this attempt (no core worker)")


def test_the_documents_name_every_gauge() -> None:
    page = (REPOSITORY / "docs/usage.md").read_text().partition("\n## Metrics\n")[2].partition("\n## ")[0]
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [name for row in rows for name in re.findall(r"`(distrec_\w+)`", row)] == list(GAUGES)
    for row in rows:
        for name, (_, label) in GAUGES.items():
            if f"`{name}`" in row:
                assert re.findall("label `(.*?)`", row) == ([label] if label else [])
