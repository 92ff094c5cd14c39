"""What `distrec manifest` writes: rendered as users render it, and checked as the API server and the operator would."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from distrec.cli import main
from distrec.config import RunConfig, load_run
from distrec.errors import InputError
from distrec.kubernetes.rules import KINDS, OVERLAYS
from distrec.methods.registry import resolve
from distrec.submission.environment import STOP_WAIT
from distrec.tuning.entries import resolve_entries
from distrec.tuning.sweep import load_sweep
from tests.documents import blocks
from tests.kubernetes.operator_rules import refusals
from tests.kubernetes.rendered import ROOT, TRAIN, needs_kubectl, one, render, written
from tests.kubernetes.schemas import complaints, needs_definitions

RANGE = (*TRAIN, "train.workers=[2,4]")
VOLUME = ("train", "configs/alignrec/demo.yaml", "data=/data/shop", "run.storage=/data/runs", "train.workers=[2,4]")
MIXED = (
    "train",
    "configs/alignrec/demo.yaml",
    "data=s3://bucket/data",
    "run.storage=/data/runs",
    "train.workers=[2,4]",
)
SWEEP = ("tune", "configs/sweeps/demo.yaml", "data=s3://bucket/data", "run.storage=s3://bucket/sweeps", "--pods", "4")
ADDRESS = ("--kind", "Job", "--address", "http://head:8265")


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def shipped() -> list[list[str]]:
    """The commands of cluster/README.md, without `distrec`."""
    (block,) = blocks((ROOT / "cluster" / "README.md").read_text(encoding="utf-8"))
    text = block.text.replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("distrec ")]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", shipped(), ids=lambda command: command[-1])
def test_shipped_manifests_are_what_the_command_writes(command: list[str], tmp_path: Path) -> None:
    """After a change: run the commands of cluster/README.md again, with the folders deleted."""
    folder = ROOT / command[-1]
    assert command[-2] == "--out"
    assert main([*command[:-1], str(tmp_path / "out")]) == 0
    assert files(tmp_path / "out") == files(folder)


def test_every_kind_and_overlay_is_shipped() -> None:
    commands = shipped()
    assert {name for command in commands for name in OVERLAYS if name in command} == set(OVERLAYS)
    kinds = {command[command.index("--kind") + 1] if "--kind" in command else "RayJob" for command in commands}
    assert kinds == set(KINDS)
    folders = {path.parent.name for path in (ROOT / "cluster").glob("*/kustomization.yaml")}
    assert folders == {Path(command[-1]).name for command in commands}


def test_lines_have_at_most_120_columns() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {line}"
        for path in (ROOT / "cluster").rglob("*.yaml")
        for line in path.read_text().splitlines()
        if len(line) > 120
    ]
    assert long == []


def checked(folder: Path) -> list[dict[str, Any]]:
    """The rendered objects, after the strict schemas and the operator's rules found nothing."""
    objects = render(folder)
    for entry in objects:
        assert complaints(entry) == []
        if entry["kind"] in ("RayJob", "RayCluster"):
            assert refusals(entry) == []
    return objects


@needs_definitions
@needs_kubectl
@pytest.mark.parametrize("command", shipped(), ids=lambda command: command[-1])
def test_shipped_manifests_pass_the_schemas_and_the_rules(command: list[str]) -> None:
    assert checked(ROOT / command[-1])


MANY = [
    ("cpu", "volcano", "autoscaling", "token", "s3", "pvc", "monitoring"),
    ("kueue", "cpu", "token", "s3", "pvc", "monitoring"),
]  # fmt: skip


@needs_definitions
@needs_kubectl
def test_overlays_can_be_combined_in_any_order(tmp_path: Path) -> None:
    """Each by itself, and as many as possible, first to last and last to first."""
    plain = checked(written(tmp_path / "plain", *RANGE))
    assert not any(effect(name, plain) for name in OVERLAYS)
    single = [(name,) for name in OVERLAYS if name != "gpu"]
    for number, overlays in enumerate([*single, *MANY, *(names[::-1] for names in MANY)]):
        arguments = MIXED if {"s3", "pvc"} <= set(overlays) else VOLUME if "pvc" in overlays else RANGE
        options = [word for name in overlays for word in ("--overlay", name)]
        objects = checked(written(tmp_path / str(number), *arguments, *options))
        assert len(objects) == len(plain) + ("monitoring" in overlays)
        assert [name for name in OVERLAYS if effect(name, objects)] == [name for name in OVERLAYS if name in overlays]


def effect(overlay: str, objects: list[dict[str, Any]]) -> bool:
    """Whether an overlay did to a RayJob what it is for."""
    job = one(objects, "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    pods = [cluster["headGroupSpec"]["template"]["spec"], cluster["workerGroupSpecs"][0]["template"]["spec"]]
    containers = [pod["containers"][0] for pod in pods]
    match overlay:
        case "cpu":
            return all("affinity" in pod for pod in pods)
        case "gpu":
            return "nvidia.com/gpu" in containers[1]["resources"]["limits"]
        case "kueue":
            return job["metadata"]["labels"].get("kueue.x-k8s.io/queue-name") == "default"
        case "volcano":
            return job["metadata"]["labels"].get("ray.io/scheduler-name") == "volcano"
        case "autoscaling":
            group = cluster["workerGroupSpecs"][0]
            started = [group[name] for name in ("minReplicas", "replicas", "maxReplicas")]
            return cluster.get("enableInTreeAutoscaling", False) and started == [2, 2, 4]
        case "token":
            return cluster["authOptions"]["mode"] == "token"
        case "s3":
            return all(
                {"secretRef": {"name": "distrec-s3"}} in container.get("envFrom", []) for container in containers
            )
        case "pvc":
            mounted = [
                {"name": "storage", "mountPath": "/data"} in container["volumeMounts"] for container in containers
            ]
            return all(mounted) and all(pod["volumes"][-1]["name"] == "storage" for pod in pods)
        case "monitoring":
            metrics = [{"protocol": "TCP", "port": 8080}]
            return any(rule.get("ports") == metrics for rule in one(objects, "NetworkPolicy")["spec"]["ingress"])
    raise AssertionError(overlay)


@needs_definitions
@needs_kubectl
@pytest.mark.parametrize(
    "overlays", [(), ("gpu", "token", "pvc"), ("autoscaling", "s3", "cpu"), ("kueue", "monitoring")]
)
def test_a_cluster_for_work_by_hand(tmp_path: Path, overlays: tuple[str, ...]) -> None:
    options = [word for name in overlays for word in ("--overlay", name)]
    objects = checked(written(tmp_path, *RANGE, "--kind", "RayCluster", *options))
    assert "ConfigMap" not in {entry["kind"] for entry in objects}
    group = one(objects, "RayCluster")["spec"]["workerGroupSpecs"][0]
    assert group["minReplicas"] == (0 if "autoscaling" in overlays else 4)
    assert ("nvidia.com/gpu" in group["template"]["spec"]["containers"][0]["resources"]["limits"]) == (
        "gpu" in overlays
    )


@needs_kubectl
def test_a_plain_job_submits_and_sends_its_config(tmp_path: Path) -> None:
    options = ("--overlay", "token", "--secret", "interactive", "--overlay", "kueue", "--queue", "team")
    objects = checked(written(tmp_path, *SWEEP[:-2], *ADDRESS, *options))
    job = one(objects, "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["distrec", "submit", "tune", "sweep.yaml", "--address", "http://head:8265"]
    configs = one(objects, "ConfigMap")["data"]
    assert {mount["subPath"] for mount in container["volumeMounts"]} == configs.keys()
    assert {entry["name"] for entry in container["env"]} == {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    sweep = yaml.safe_load(configs["sweep.yaml"])
    assert sweep["methods"]["lightgcn"]["config"] == "method-lightgcn.yaml"  # beside it, in what is sent


@needs_kubectl
def test_a_run_job_holds_what_a_run_needs(tmp_path: Path) -> None:
    changed = ("train.workers=3", "train.cpus_per_worker=2", "train.wait_for_cluster=900.5", "--memory", "12Gi")
    objects = render(written(tmp_path, *TRAIN, *changed))
    spec = one(objects, "RayJob")["spec"]
    head, (group,) = spec["rayClusterSpec"]["headGroupSpec"], spec["rayClusterSpec"]["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert head["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] == "5Gi"
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 3
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"] == resources["requests"] == {"cpu": "2", "memory": "12Gi"}
    assert spec["preRunningDeadlineSeconds"] == 901 + 600
    assert spec["submitterConfig"]["backoffLimit"] == 0
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"]
    stop = int(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    assert stop == int(STOP_WAIT["RAY_JOB_STOP_WAIT_TIME_S"])
    submitter = spec["submitterPodTemplate"]["spec"]
    for pod in (head["template"]["spec"], group["template"]["spec"], submitter):
        (container,) = pod["containers"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        if pod is not submitter:
            drain = next(e["value"] for e in container["env"] if e["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
            assert stop <= int(drain) < pod["terminationGracePeriodSeconds"]
            (memory,) = (volume for volume in pod["volumes"] if volume["name"] == "shared-memory")
            assert memory["emptyDir"]["medium"] == "Memory"
            assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]


@needs_kubectl
def test_the_network_policy_selects_all_pods_of_the_job(tmp_path: Path) -> None:
    objects = render(written(tmp_path, *TRAIN, "--name", "mine"))
    spec, policy = one(objects, "RayJob")["spec"], one(objects, "NetworkPolicy")["spec"]
    selected = policy["podSelector"]["matchLabels"]
    cluster = spec["rayClusterSpec"]
    templates = [
        cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"], spec["submitterPodTemplate"]
    ]  # fmt: skip
    for template in templates:
        assert selected.items() <= template["metadata"]["labels"].items()
    assert {"from": [{"podSelector": {"matchLabels": selected}}]} in policy["ingress"]  # all ports


@needs_kubectl
def test_the_driver_reads_the_config_as_it_was_given(tmp_path: Path) -> None:
    config = one(render(written(tmp_path, *RANGE)), "ConfigMap")
    file = tmp_path / "run.yaml"
    file.write_text(config["data"]["run.yaml"])
    assert load_run(file) == resolve(load_run(TRAIN[1], [*TRAIN[2:], "train.workers=[2,4]"]))


@needs_kubectl
@pytest.mark.parametrize("changed", [[], ["scheduler=asha", "asha.grace=2"]])
def test_the_driver_of_a_sweep_reads_every_config_as_it_was_given(tmp_path: Path, changed: list[str]) -> None:
    objects = render(written(tmp_path, *SWEEP[:-2], *changed, "--pods", "4"))
    (cluster,) = (entry["spec"]["rayClusterSpec"] for entry in objects if entry["kind"] == "RayJob")
    assert cluster["workerGroupSpecs"][0]["minReplicas"] == 4
    mounted = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"][1]["mountPath"]
    for name, text in one(objects, "ConfigMap")["data"].items():
        (tmp_path / name).write_text(text.replace(f"{mounted}/", f"{tmp_path}/"))
    again, given = load_sweep(tmp_path / "sweep.yaml"), load_sweep(SWEEP[1], [*SWEEP[2:4], *changed])
    assert resolve_entries(again) == resolve_entries(given)
    own = {"methods", "prepare"}  # hold the paths of other files
    assert again.model_dump(exclude=own) == given.model_dump(exclude=own)
    assert again.prepare is not None
    assert (
        Path(again.prepare.config).read_bytes()
        == Path(written(tmp_path / "b", *SWEEP) / "base/prepare.yaml").read_bytes()
    )


def test_memory_is_that_of_the_plan_with_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a sweep, of its hungriest method."""
    bytes_of = {"popularity": 10**9, "odmt": 6 * 2**30}
    planner = SimpleNamespace(worker_bytes=lambda config: bytes_of.get(config.method["name"], 2 * 10**9))
    monkeypatch.setitem(sys.modules, "distrec.sizing", planner)
    assert main(["manifest", *SWEEP, "--out", str(tmp_path / "out")]) == 0
    assert 'limits: {cpu: "1", memory: 9Gi}' in (tmp_path / "out" / "base" / "rayjob.yaml").read_text()


def test_a_plan_that_cannot_read_the_data_says_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreadable(config: RunConfig) -> int:
        raise InputError(f"data '{config.data}' does not exist; correct the path.")

    monkeypatch.setitem(sys.modules, "distrec.sizing", SimpleNamespace(worker_bytes=unreadable))
    assert main(["manifest", *TRAIN, "--out", str(tmp_path / "out")]) == 2
    assert "correct the path; or give the memory of a worker's pod, such as --memory 8Gi." in capsys.readouterr().err


def test_a_job_ends_after_its_budget_and_a_day(tmp_path: Path) -> None:
    folder = written(tmp_path, *SWEEP, "budget.hours=30.5")
    assert "\n  activeDeadlineSeconds: 196200 " in (folder / "base" / "rayjob.yaml").read_text()


def test_a_folder_with_files_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path, *TRAIN)
    before = files(folder)
    assert main(["manifest", *TRAIN, "--memory", "9Gi", "--out", str(folder)]) == 2
    assert re.search(r"there already; .* new folder", capsys.readouterr().err)
    assert files(folder) == before


def test_the_command_in_the_manifest_writes_it_again(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", *RANGE, "--overlay", "token", "--name", "mine")
    lines = (folder / "kustomization.yaml").read_text().splitlines()
    start = lines.index("# Written by:") + 1
    text = "\n".join(line.removeprefix("#   ") for line in lines[start:] if line.startswith("#   "))
    words = shlex.split(text.replace("\\\n", " "))
    assert main([*words[1:], "--out", str(tmp_path / "b")]) == 0
    assert files(folder) == files(tmp_path / "b")
