"""What the lab's operator derives from a manifest, and which status follows; `tests/lab/test_rayjob.py` runs it."""

from __future__ import annotations

import base64
import copy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.lab.operator import Sight, Status, judge
from tests.lab.pods import Mount, PlainJob, Pod, expanded, quantity
from tests.lab.rayjob import RayJob, start_parameters, submit_line

DOCUMENTS = """
apiVersion: ray.io/v1
kind: RayJob
metadata: {name: demo, namespace: team}
spec:
  entrypoint: distrec train /etc/distrec/run.yaml
  runtimeEnvYAML: "env_vars: {RAY_JOB_STOP_WAIT_TIME_S: '300'}"
  backoffLimit: 2
  submitterConfig: {backoffLimit: 0}
  activeDeadlineSeconds: 1000
  preRunningDeadlineSeconds: 100
  shutdownAfterJobFinishes: true
  ttlSecondsAfterFinished: 60
  rayClusterSpec:
    rayVersion: 2.60.0
    headGroupSpec:
      rayStartParams: {num-cpus: "0"}
      template:
        spec:
          terminationGracePeriodSeconds: 330
          containers:
            - name: ray-head
              image: distrec
              env:
                - {name: RAY_AUTH_MODE, value: disabled}
                - {name: HOST, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
                - {name: URL, value: "http://$(HOST):$(PORT)"}
              resources: {limits: {cpu: 1500m, memory: 5Gi}}
              volumeMounts: [{name: config, mountPath: /etc/distrec, readOnly: true}]
          volumes: [{name: config, configMap: {name: demo-config}}]
    workerGroupSpecs:
      - groupName: workers
        replicas: 2
        template:
          spec:
            securityContext: {runAsUser: 1001, fsGroup: 1002}
            containers:
              - name: ray-worker
                envFrom: [{secretRef: {name: keys}}]
                env: [{name: RAY_ADDRESS, value: elsewhere}]
                securityContext: {runAsUser: 1003}
                resources: {requests: {cpu: 2, memory: 2Gi}}
                volumeMounts:
                  - {name: memory, mountPath: /dev/shm}
                  - {name: claim, mountPath: /data, subPath: runs}
            volumes:
              - {name: memory, emptyDir: {medium: Memory, sizeLimit: 640Mi}}
              - {name: claim, persistentVolumeClaim: {claimName: runs}}
---
kind: ConfigMap
metadata: {name: demo-config}
data: {run.yaml: "data: s3://lab/data"}
---
kind: Secret
metadata: {name: keys}
data: {AWS_ACCESS_KEY_ID: bGFiLWtleQ==}
stringData: {AWS_SECRET_ACCESS_KEY: planted}
---
kind: PersistentVolumeClaim
metadata: {name: runs}
spec: {}
---
kind: NetworkPolicy
metadata: {name: demo}
"""


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(DOCUMENTS))


def all_pods(own: list[dict[str, Any]]) -> list[Pod]:
    job = RayJob(own)
    return [job.head("c"), *job.workers("c"), job.submitter("c", "c")]


@pytest.fixture
def rayjob() -> RayJob:
    return RayJob(documents())


def test_the_commands_of_head_and_workers(rayjob: RayJob) -> None:
    head, workers = rayjob.head("demo-abcde", "10.0.0.1"), rayjob.workers("demo-abcde", ["10.0.0.2", "10.0.0.3"])
    assert head.main.command == (
        "/bin/bash", "-c", "--",
        "ulimit -n ${RAY_START_ULIMIT_OPEN_FILES:-65536}; ray start --head --block --dashboard-agent-listen-port=52365 "
        "--dashboard-host=0.0.0.0 --memory=5368709120 --metrics-export-port=8080 --num-cpus=0",
    )  # fmt: skip
    assert [pod.name for pod in workers] == ["demo-abcde-workers-worker-0", "demo-abcde-workers-worker-1"]
    gcs = "demo-abcde-head-svc.team.svc.cluster.local:6379"
    common = "--block --dashboard-agent-listen-port=52365 --metrics-export-port=8080 --num-cpus=2"
    assert workers[0].main.command[-1].endswith(f"; ray start --address={gcs} {common}")
    (wait,) = workers[0].init
    assert f"ray health-check --address {gcs}" in wait.command[-1]
    assert head.init == ()
    assert (head.grace, workers[0].grace) == (330, 30)


def test_the_environment_of_pods(rayjob: RayJob) -> None:
    head = rayjob.head("demo-abcde", "10.0.0.1").main.environment
    assert head["URL"] == "http://10.0.0.1:$(PORT)"
    assert head["RAY_ADDRESS"] == "127.0.0.1:6379"
    assert head["RAY_CLOUD_INSTANCE_ID"] == "demo-abcde-head"
    worker = rayjob.workers("demo-abcde")[0]
    assert worker.main.environment["AWS_ACCESS_KEY_ID"] == "lab-key"
    assert worker.main.environment["AWS_SECRET_ACCESS_KEY"] == "planted"
    assert worker.main.environment["RAY_ADDRESS"] == "elsewhere"
    assert worker.main.environment["RAY_NODE_TYPE_NAME"] == "workers"
    assert "AWS_ACCESS_KEY_ID" not in worker.init[0].environment
    assert worker.init[0].environment["RAY_ADDRESS"] == "elsewhere"
    assert (worker.main.user, worker.main.files_group) == (1003, 1002)


def test_the_volumes_of_pods(rayjob: RayJob) -> None:
    head, worker = rayjob.head("demo-abcde").main, rayjob.workers("demo-abcde")[0].main
    config = Mount("/etc/distrec", "config", {"run.yaml": b"data: s3://lab/data"}, read_only=True)
    assert head.mounts == (config, Mount("/dev/shm", "shared-mem", memory=5 << 30))
    memory = Mount("/dev/shm", "memory", memory=640 << 20)
    assert worker.mounts == (memory, Mount("/data", "claim", key="runs", claim="runs"))


@pytest.mark.parametrize("secret", ["token", ""])
def test_a_token_reaches_every_pod(secret: str) -> None:
    """One of a Secret, or one that the operator makes for each cluster."""
    own = documents()
    own[0]["spec"]["rayClusterSpec"]["authOptions"] = {"mode": "token"} | ({"secretName": secret} if secret else {})
    own.append({"kind": "Secret", "metadata": {"name": "token"}, "data": {"auth_token": base64.b64encode(b"planted")}})
    job = RayJob(own)
    worker, submitter = job.workers("c")[0], job.submitter("c", "c-1")
    pods = [job.head("c").main, worker.main, worker.init[0], submitter.main]
    (token,) = {pod.environment["RAY_AUTH_TOKEN"] for pod in pods}
    assert token == "planted" if secret else len(token) > 20
    assert job.head("d").main.environment["RAY_AUTH_TOKEN"] == token or not secret
    # The manifest's own value for the head wins, as with KubeRay.
    assert [pod.environment["RAY_AUTH_MODE"] for pod in pods] == ["disabled", "token", "token", "token"]


@pytest.mark.parametrize(
    ("group", "want"),
    [
        ({"resources": {"limits": {"cpu": "2100m", "memory": "1M"}, "requests": {"cpu": 1}}}, {"num-cpus": "3"}),
        ({"resources": {"requests": {"cpu": "100m"}}}, {"num-cpus": "1"}),
        ({"resources": {"limits": {"nvidia.com/gpu": "2"}}}, {"num-gpus": "2"}),
        ({"resources": {"limits": {"memory": "8Gi"}}}, {"memory": str(8 << 30)}),
        ({}, {"metrics-export-port": "8080", "address": "head:6379", "block": "true"}),
    ],
)
def test_parameters_follow_from_the_resources_of_a_pod(group: dict[str, Any], want: dict[str, str]) -> None:
    found = start_parameters({"template": {"spec": {"containers": [group]}}}, head=False, gcs="head:6379")
    assert want.items() <= found.items()


def test_the_submitter_submits_once_what_its_shell_has_read(rayjob: RayJob, tmp_path: Path) -> None:
    """With a `ray` that only writes down its arguments, and knows a job once it was submitted."""
    for name, script in {
        "ray": 'echo "$*" >> calls\ncase "$2" in status) [ -e there ] ;; submit) touch there ;; esac',
        "python3": "exit 0",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o700)
    line = submit_line({"entrypoint": "say $WHO 'a  b'; touch after", "metadata": {"a": "b c"}}, "http://h:8265", "id")
    for _ in range(2):
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "WHO": "me"}
        subprocess.run(["/bin/bash", "-ce", "--", line], cwd=tmp_path, env=environment, check=True, timeout=20)
    assert (tmp_path / "calls").read_text().splitlines() == [
        "job status --address http://h:8265 id",
        'job submit --address http://h:8265 --no-wait --metadata-json {"a": "b c"} --submission-id id -- say me a  b',
        "job logs --address http://h:8265 --follow id",
        "job status --address http://h:8265 id",
        "job logs --address http://h:8265 --follow id",
    ]
    assert (tmp_path / "after").exists()  # the submitter has run a part of the entrypoint
    own = rayjob.submitter("demo-abcde", "demo-abcde")
    assert own.main.command[:3] == ("/bin/bash", "-ce", "--")
    assert '--runtime-env-json "{\\"env_vars\\": {\\"RAY_JOB_STOP_WAIT_TIME_S\\": \\"300\\"}}"' in own.main.command[3]
    assert own.main.environment["RAY_JOB_SUBMISSION_ID"] == "demo-abcde"


@pytest.mark.parametrize(
    ("place", "field", "value"),
    [
        ((), "entrypointNumCpu", 1),
        ((), "submissionMode", "HTTPMode"),
        ((), "suspend", True),
        (("rayClusterSpec",), "enableInTreeAutoscaling", True),
        (("rayClusterSpec", "workerGroupSpecs", 0), "numOfHosts", 2),
        (("rayClusterSpec", "headGroupSpec", "template", "spec"), "hostNetwork", True),
        (("rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0), "lifecycle", {}),
        (("rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "env", 0), "valueFrom", {"x": {}}),
        (("rayClusterSpec", "headGroupSpec", "template", "spec", "volumes", 0), "hostPath", {}),
        (("rayClusterSpec", "headGroupSpec", "template", "spec", "volumes", 0), "configMap", {"name": "other"}),
    ],
)
def test_what_the_harness_does_not_know_or_find_is_refused(place: tuple[Any, ...], field: str, value: Any) -> None:
    own = copy.deepcopy(documents())
    at = own[0]["spec"]
    for step in place:
        at = at[step]
    at[field] = value
    with pytest.raises(ValueError, match=r"the harness|there is no"):
        all_pods(own)


@pytest.mark.parametrize("name", ["train", "tune", "encode", "job"])
def test_the_harness_knows_every_field_of_the_shipped_manifests(name: str) -> None:
    """Without their overlays, of which autoscaling cannot run here."""
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl to render the manifests in cluster/")
    command = ["kubectl", "kustomize", str(ROOT / "cluster" / name / "base")]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    own = list(yaml.safe_load_all(text))
    pods = [PlainJob(own).one_pod()] if name == "job" else all_pods(own)
    assert len(pods) == 1 or len(pods) > 2
    for pod in pods:
        assert pod.main.user == 1000
        assert pod.main.command


@pytest.mark.parametrize(
    ("text", "want"), [("500m", 0.5), ("2", 2), (3, 3), ("8Gi", 8 << 30), ("1.5k", 1500), ("1e3", 1000), ("1E", 1e18)]
)
def test_quantities(text: str | int, want: float) -> None:
    assert float(quantity(text)) == want


def test_what_is_no_quantity() -> None:
    with pytest.raises(ValueError, match="'8 Gi' is not a quantity"):
        quantity("8 Gi")


def test_references_are_expanded_as_by_kubernetes() -> None:
    assert expanded("$(A) $(B) $$(A) $A ${A}", {"A": "a"}) == "a $(B) $(A) $A ${A}"


RUNNING = Status("Running", "RUNNING", cluster="c", submission="c", since=50)


@pytest.mark.parametrize(
    ("status", "seen", "now", "want"),
    [
        (Status("Initializing", since=50), Sight(), 149, "Initializing"),
        (Status("Initializing", since=50), Sight(ready=True), 149, "Running"),
        (Status("Initializing", since=50), Sight(ready=True), 150, "Retrying PreRunningDeadlineExceeded"),
        (RUNNING, Sight(job="RUNNING"), 1049, "Running"),
        (RUNNING, Sight(job="RUNNING"), 1050, "Failed DeadlineExceeded"),  # never retried
        (RUNNING, Sight(job="SUCCEEDED"), 100, "Running"),  # until its log is complete
        (RUNNING, Sight(job="SUCCEEDED", submitter=0), 100, "Complete"),
        (RUNNING, Sight(job="STOPPED", submitter=0), 100, "Complete"),
        (RUNNING, Sight(job="FAILED", submitter=0), 100, "Retrying AppFailed"),
        (RUNNING, Sight(job="RUNNING", submitter=1), 100, "Retrying SubmissionFailed"),
        (RUNNING, Sight(submitter=0), 100, "Retrying AppFailed"),  # the head has lost the job
        (RUNNING, Sight(), 100, "Running"),
        (Status("Running", "RUNNING", since=50, silent=60), Sight(), 359, "Running"),
        (Status("Running", "RUNNING", since=50, silent=60), Sight(), 360, "Retrying JobStatusCheckTimeoutExceeded"),
        (Status("Running", "FAILED", since=50, failed=1), Sight(submitter=1), 100, "Retrying AppFailed"),
        (Status("Running", "FAILED", since=50, failed=2), Sight(submitter=1), 100, "Failed AppFailed"),
    ],
)
def test_the_status_that_follows(rayjob: RayJob, status: Status, seen: Sight, now: float, want: str) -> None:
    found = judge(status, rayjob, seen, now)
    assert f"{found.deployment} {found.reason}".strip() == want
    assert found.failed == status.failed + (found.deployment in ("Retrying", "Failed"))


def test_a_silence_that_ends_is_forgotten(rayjob: RayJob) -> None:
    silent = judge(RUNNING, rayjob, Sight(), 100)
    assert silent.silent == 100
    assert judge(silent, rayjob, Sight(job="RUNNING"), 200).silent is None
