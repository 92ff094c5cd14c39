"""What `distrec manifest` writes, run on the lab's hosts as KubeRay would run it: a RayJob that is retried, and a Job.

No Kubernetes runs here, see `tests.lab.operator`. What comes from the manifests is real: commands, environment, files,
users, shared memory, number of pods and retries.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.lab import observe
from tests.lab.cluster import KEY, SECRET, WORKERS, Cluster
from tests.lab.faults import CONFIG, EPOCHS, LR, SETTINGS, STEPS, Undisturbed
from tests.lab.hosts import wait_until
from tests.lab.kubelet import USER, Placed
from tests.lab.observe import TRAINER
from tests.lab.operator import HEAD, SUBMITTER, Operator
from tests.lab.pods import PlainJob
from tests.lab.site import RUNS, distrec
from tests.training import small

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1200)]

_SECRET = "object-store"
_BEFORE = 2  # epochs before the head is lost
_PATIENCE = 60  # seconds without a status of the job, which may still be being submitted; KubeRay waits for minutes


@pytest.fixture
def hosts(site: Cluster, undisturbed: Undisturbed) -> Iterator[Cluster]:
    """The lab with storage and data, but without Ray, which is started again at the end."""
    names = (HEAD, *WORKERS)
    _restart(site, names)
    yield site
    _restart(site, (*names, SUBMITTER))
    site.start()


def _restart(site: Cluster, names: tuple[str, ...]) -> None:
    for name in names:
        site.lab[name].power_off()
        site.lab[name].power_on()


def rendered(site: Cluster, run: str, *options: str) -> list[dict[str, Any]]:
    """The documents for a run of two workers, as `kubectl` prints them, with the Secret that a user makes by hand."""
    if shutil.which("kubectl") is None:
        pytest.skip("the manifests are rendered by 'kubectl kustomize', and there is no kubectl")
    storage, own = site.lab["storage"], (f"run.storage={RUNS}", f"run.name={run}", "train.workers=2")
    distrec(site, "manifest", "train", CONFIG, *SETTINGS, *own, "--out", f"/tmp/{run}", *options)
    command = ["kubectl", "kustomize", str(storage.tmp / run)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": site.storage.environment["AWS_ENDPOINT_URL"], "AWS_REGION": "us-east-1"}  # fmt: skip
    secret = {"kind": "Secret", "metadata": {"name": _SECRET}, "stringData": keys}
    return [*yaml.safe_load_all(text), secret]


def whole_epochs(site: Cluster, run: str) -> int:
    """How many whole epochs have a checkpoint."""
    complete = [key for key in site.storage.keys(f"runs/{run}/checkpoints/") if key.endswith("/complete.json")]
    return max((int(key.split("/")[-2].split("-")[1]) for key in complete), default=0)


def test_a_rayjob_that_loses_its_cluster_is_retried_and_goes_on(
    hosts: Cluster, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    run, lab = "rayjob", hosts.lab
    options = ("--memory", "4Gi", "--overlay", "s3", "--overlay", "token", "--secret", _SECRET)
    operator = Operator(lab, rendered(hosts, run, *options), _PATIENCE)
    operator.wait_for("Running", timeout=240)
    first = operator.status

    def trained() -> bool:
        operator.reconcile()
        assert operator.status.deployment == "Running", f"{operator.status}\n{operator.text()}"
        return whole_epochs(hosts, run) >= _BEFORE

    wait_until(trained, 300, f"{_BEFORE} epochs", every=1)
    training = {name: lab[name].processes(TRAINER) for name in WORKERS}
    assert sorted(name for name, found in training.items() if found) == ["w1", "w2"]
    token = operator.pods[HEAD].pod.main.environment["RAY_AUTH_TOKEN"]
    for host in lab.hosts.values():
        for process in host.processes():
            assert SECRET not in process.command
            assert token not in process.command
    assert {_user(process.pid) for found in training.values() for process in found} == {USER}

    lab[HEAD].power_off()
    retrying = operator.wait_for("Retrying", timeout=200)
    assert retrying.failed == 1
    second = operator.wait_for("Running", timeout=400)
    assert second.cluster != first.cluster
    assert second.submission != first.submission
    operator.wait_for("Complete", "Failed", timeout=400)
    states = [status.deployment for status in operator.history]
    assert states == ["Initializing", "Running", "Retrying", "", "Initializing", "Running", "Complete"], operator.text()

    copy = hosts.storage.fetch(f"runs/{run}", tmp_path / run)
    attempts = small.read(copy, "run.json")["attempts"]
    assert [attempt["outcome"] for attempt in attempts] == ["killed", "done"]
    assert attempts[1]["start"]["epoch"] >= _BEFORE, "the retry began anew"
    rows = observe.rows(copy)
    assert rows["expected"] == rows["trained"]
    assert rows["duplicated"] == rows["lost"] == 0
    assert observe.difference(undisturbed.run(EPOCHS), copy, LR, EPOCHS * STEPS) in ("bit-equal", "equal")


def test_a_plain_job_submits_to_a_cluster_that_is_there(site: Cluster, encoded: str, tmp_path: Path) -> None:
    run = "plain-job"
    job = PlainJob(rendered(site, run, "train.epochs=2", "--kind", "Job", "--address", site.url))
    pod = Placed(site.lab[SUBMITTER], job.one_pod(), {host.name: host.address for host in site.lab.hosts.values()})
    pod.advance()
    wait_until(lambda: pod.status is not None, 400, "the end of the pod")
    status, log = pod.status, pod.text()
    pod.end()
    assert status == 0, log
    assert "alignrec: best epoch" in log
    copy = site.storage.fetch(f"runs/{run}", tmp_path / run)
    assert [attempt["outcome"] for attempt in small.read(copy, "run.json")["attempts"]] == ["done"]


def _user(pid: int) -> int:
    return Path(f"/proc/{pid}").stat().st_uid
