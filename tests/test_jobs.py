"""`jobs/<verb>.py` on a Ray cluster that this test starts: jobs are submitted with their working folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import distrec
from tests.ray_head import RAY, ray_head
from tests.training import small

pytestmark = pytest.mark.multiprocess

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Cluster:
    address: str
    environment: dict[str, str]
    working_dir: Path

    def submit(self, job: str, *entrypoint: str, timeout: float = 240) -> tuple[int, str]:
        """Submit a job and wait for its end; returns the exit status of the submission and its output."""
        done = subprocess.run(
            [RAY, "job", "submit", "--address", self.address, "--submission-id", job,
             "--working-dir", str(self.working_dir), "--", *entrypoint],
            env=self.environment, timeout=timeout, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    def job(self, job: str) -> tuple[str, int]:
        """The status and exit code of a job that has ended."""
        with urllib.request.urlopen(f"{self.address}/api/jobs/{job}", timeout=30) as answer:
            record = json.load(answer)
        return record["status"], record["driver_exit_code"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head node with 3 CPUs on its own ports, and a copy of the parts of the repository that jobs need."""
    folder = tmp_path_factory.mktemp("head")
    working_dir = folder / "repository"
    working_dir.mkdir()
    for name in ("distrec", "jobs", "configs"):
        shutil.copytree(REPOSITORY / name, working_dir / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    with ray_head(folder, 3, environment) as head:
        started = Cluster(head.address, head.environment, working_dir)
        wait_until_accepting(started)
        yield started


def wait_until_accepting(cluster: Cluster) -> None:
    """Wait until a job runs: the head answers before the node's agent, which starts jobs, has registered."""
    deadline, number = time.monotonic() + 120, 0
    while time.monotonic() < deadline:
        status, printed = cluster.submit(f"ready-{number}", "true")
        if "No available agent" not in printed:
            assert status == 0, printed
            return
        number += 1
        time.sleep(1)
    pytest.fail("the head node accepted no job in time")


def test_a_training_job_trains_on_the_cluster_and_failing_ones_fail(tmp_path: Path, cluster: Cluster) -> None:
    data, runs = small.write_small(tmp_path / "data"), tmp_path / "runs"
    settings = [f"data={data}", "train.epochs=2", "train.global_batch=64", "method.dim=8", "train.checkpoint_every=0"]
    entrypoint = ["python", "jobs/train.py", "configs/lightgcn/demo.yaml", *settings, f"run.storage={runs}"]
    status, printed = cluster.submit("train", *entrypoint)
    assert status == 0, printed
    assert cluster.job("train") == ("SUCCEEDED", 0)
    run = runs / "lightgcn-demo"
    summary = small.read(run, "summary.json")
    record = small.read(run, "run.json")
    assert record["world_size"] == 2
    assert [epoch["workers"] for epoch in small.metrics(run)] == [2, 2]

    # The same run in this process without Ray gives the same result (promise 1 of docs/design.md).
    config, alone = REPOSITORY / "configs/lightgcn/demo.yaml", tmp_path / "alone"
    wanted = distrec.train(config, [*settings, f"run.storage={alone}", "train.workers=0"])
    small.same_losses(run, alone / "lightgcn-demo", rtol=1e-5)
    small.same_tensors(small.tensors(alone / "lightgcn-demo"), small.tensors(run), 5e-4, 1)
    assert summary["best_epoch"] == wanted["best_epoch"]
    for split in ("valid", "test"):
        # Metrics are equal: scores agree to six digits, and no held-out item's score is that close to another item's.
        assert summary[split] == pytest.approx(wanted[split], abs=1e-9)

    # The final table shows the numbers of the summary, with one metric per line.
    assert f"lightgcn: best epoch {summary['best_epoch']} of 2" in printed
    found = re.findall(r"^ +(\w+@\d+) +(\d\.\d{4}) +(\d\.\d{4})$", printed, re.MULTILINE)
    values = {name: (summary["valid"][name], summary["test"][name]) for name in summary["valid"]}
    assert found == [(name, f"{valid:.4f}", f"{test:.4f}") for name, (valid, test) in values.items()]

    # On invalid input the job prints the same message as the command, without a traceback, and fails.
    status, printed = cluster.submit("bad", *entrypoint, "train.seed=9")
    assert status != 0
    assert "train.seed = 1, now 9" in printed
    assert "Traceback" not in printed
    assert cluster.job("bad") == ("FAILED", 2)
