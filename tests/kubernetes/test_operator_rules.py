"""Each rule of the API server and the operator, as ported, refuses a manifest that breaks it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.kubernetes.operator_rules import refusals
from tests.kubernetes.rendered import ROOT
from tests.kubernetes.schemas import complaints, definition, needs_definitions

JOB = yaml.safe_load((ROOT / "cluster" / "train" / "base" / "rayjob.yaml").read_text())
Change = Callable[[dict[str, Any], dict[str, Any]], object]


def changed(change: Change) -> dict[str, Any]:
    """The shipped RayJob after a change to its specification or its cluster's."""
    job = copy.deepcopy(JOB)
    change(job["spec"], job["spec"]["rayClusterSpec"])
    return job


def head(cluster: dict[str, Any]) -> dict[str, Any]:
    return cluster["headGroupSpec"]["template"]["spec"]


def worker(cluster: dict[str, Any]) -> dict[str, Any]:
    return cluster["workerGroupSpecs"][0]


def variable(cluster: dict[str, Any], name: str) -> None:
    head(cluster)["containers"][0]["env"].append({"name": name, "value": "1"})


def limits(cluster: dict[str, Any]) -> Any:
    return worker(cluster)["template"]["spec"]["containers"][0]["resources"]["limits"]


def scaling(cluster: dict[str, Any], **more: Any) -> None:
    head(cluster)["automountServiceAccountToken"] = True
    cluster.update({"enableInTreeAutoscaling": True, "autoscalerOptions": {"version": "v2"}, **more})


def deletion(**strategy: Any) -> Change:
    def change(spec: dict[str, Any], cluster: dict[str, Any]) -> None:
        spec["deletionStrategy"] = strategy
        if "deletionRules" in strategy:
            spec.update(shutdownAfterJobFinishes=False, ttlSecondsAfterFinished=0)

    return change


SELECTOR = {"ray.io/cluster": "a"}
POLICY, RULE = {"policy": "DeleteCluster"}, {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED"}}
BOTH = {"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed"}}
BROKEN: list[tuple[str, Change]] = [
    ("one of rayClusterSpec and clusterSelector", lambda s, c: s.pop("rayClusterSpec")),
    ("clusterSelector names no cluster", lambda s, c: s.update(clusterSelector={"a": "b"})),
    ("suspend needs shutdownAfterJobFinishes", lambda s, c: s.update(suspend=True, shutdownAfterJobFinishes=False)),
    ("suspend does not go with clusterSelector", lambda s, c: s.update(suspend=True, clusterSelector=SELECTOR)),
    ("submissionMode is unknown", lambda s, c: s.update(submissionMode="Foo")),
    ("SidecarMode has no", lambda s, c: s.update(submissionMode="SidecarMode")),
    ("backoffLimit is negative", lambda s, c: s.update(backoffLimit=-1)),
    ("backoffLimit does not go with", lambda s, c: s.update(submissionMode="InteractiveMode")),
    ("backoffLimit does not go with", lambda s, c: s.update(clusterSelector=SELECTOR)),
    ("activeDeadlineSeconds is not positive", lambda s, c: s.update(activeDeadlineSeconds=0)),
    ("preRunningDeadlineSeconds is not positive", lambda s, c: s.update(preRunningDeadlineSeconds=0)),
    ("ttlSecondsAfterFinished is negative", lambda s, c: s.update(ttlSecondsAfterFinished=-1)),
    ("ttlSecondsAfterFinished needs", lambda s, c: s.update(shutdownAfterJobFinishes=False)),
    ("managedBy is unknown", lambda s, c: s.update(managedBy="me")),
    ("managedBy is unknown", lambda s, c: c.update(managedBy="me")),
    ("deletionRules do not go with onSuccess", deletion(onSuccess=POLICY, onFailure=POLICY, deletionRules=[RULE])),
    ("deletionStrategy needs both", deletion(onSuccess=POLICY)),
    ("deletionStrategy needs both", deletion(deletionRules=[])),
    ("deletionRules do not go with shutdown", lambda s, c: s.update(deletionStrategy={"deletionRules": [RULE]})),
    ("a deletion condition needs", deletion(deletionRules=[BOTH])),
    ("a deletion condition needs", deletion(deletionRules=[RULE | {"condition": {"ttlSeconds": 1}}])),
    ("entrypoint is read by a shell", lambda s, c: s.update(entrypoint="distrec train 'a b'")),
    ("entrypoint is read by a shell", lambda s, c: s.update(entrypoint="distrec train $HOME/a")),
    ("entrypoint is read by a shell", lambda s, c: s.update(entrypoint="distrec train a; true")),
    ("entrypoint is read by a shell", lambda s, c: s.update(entrypoint=" ")),
    ("runtimeEnvYAML is expanded", lambda s, c: s.update(runtimeEnvYAML="env_vars: {A: $HOME}")),
    ("runtimeEnvYAML is no mapping", lambda s, c: s.update(runtimeEnvYAML="text")),
    ("runtimeEnvYAML is no YAML", lambda s, c: s.update(runtimeEnvYAML="{a: [")),
    ("has no container", lambda s, c: worker(c)["template"]["spec"].update(containers=[])),
    ("has no container", lambda s, c: head(c).update(containers=[])),
    ("has resources twice", lambda s, c: c["headGroupSpec"].update(resources={"CPU": "1"})),
    ("has labels in rayStartParams", lambda s, c: worker(c)["rayStartParams"].update(labels="a=b")),
    ("has a parameter that is no text", lambda s, c: worker(c)["rayStartParams"].update({"num-cpus": 1})),
    ("two worker groups have one name", lambda s, c: c["workerGroupSpecs"].append(copy.deepcopy(worker(c)))),
    ("has replicas outside", lambda s, c: worker(c).update(replicas=9)),
    ("has a part of a CPU", lambda s, c: limits(c).update(cpu="500m")),
    ("Redis is set up", lambda s, c: c.update(gcsFaultToleranceOptions={"redisAddress": "a:1"})),
    ("Redis is set up", lambda s, c: variable(c, "RAY_REDIS_ADDRESS")),
    ("autoscaler v2 without", lambda s, c: variable(c, "RAY_enable_autoscaler_v2")),
    ("a worker group is suspended", lambda s, c: (scaling(c), worker(c).update(suspend=True))),
    ("set twice", lambda s, c: (scaling(c), variable(c, "RAY_enable_autoscaler_v2"))),
    ("restartPolicy must be Never", lambda s, c: (scaling(c), head(c).update(restartPolicy="Always"))),
    ("the autoscaler has no token", lambda s, c: (scaling(c), head(c).update(automountServiceAccountToken=False))),
    ("needs rayVersion 2.52.0", lambda s, c: c.update(authOptions={"mode": "token"}, rayVersion="2.51.9")),
    ("needs rayVersion 2.52.0", lambda s, c: (c.update(authOptions={"mode": "token"}), c.pop("rayVersion"))),
    ("RAY_AUTH_MODE is set by hand", lambda s, c: c.update(authOptions={"mode": "token"})),
]  # fmt: skip


def test_the_shipped_job_breaks_none() -> None:
    assert refusals(JOB) == []
    assert refusals(changed(lambda s, c: scaling(c))) == []
    assert refusals(changed(deletion(deletionRules=[RULE]))) == []


@pytest.mark.parametrize(("message", "change"), BROKEN, ids=[message for message, _ in BROKEN])
def test_each_rule_refuses(message: str, change: Change) -> None:
    assert any(message in found for found in refusals(changed(change)))


@pytest.mark.parametrize(("metadata", "message"), [
    ({"name": "a" * 48}, "longer than 47"), ({"name": "A"}, "no DNS-1035 label"), ({"name": "1a"}, "no DNS-1035 label"),
    ({"name": "a", "labels": {"app": "a b"}}, "label value 'a b' is invalid"),
])  # fmt: skip
def test_metadata_is_checked(metadata: dict[str, Any], message: str) -> None:
    assert any(message in found for found in refusals(JOB | {"metadata": metadata}))


@needs_definitions
@pytest.mark.parametrize(("message", "change"), [
    ("entrypointNumCpu", lambda s, c: s.update(entrypointNumCpu=1)),
    ("'3' is not of type 'integer'", lambda s, c: s.update(backoffLimit="3")),
    ("replica", lambda s, c: worker(c).update(replica=1)),
    ("minReplicas", lambda s, c: worker(c).pop("minReplicas")),
    ("'off' is not one of", lambda s, c: c.update(authOptions={"mode": "off"})),
    ("runAsUsr", lambda s, c: head(c)["securityContext"].update(runAsUsr=1)),
    ("imagePullPolice", lambda s, c: worker(c)["template"]["spec"]["containers"][0].update(imagePullPolice="Always")),
    ("is not valid under any", lambda s, c: head(c)["containers"][0]["resources"]["limits"].update(memory=1.5)),
])  # fmt: skip
def test_the_strict_schema_refuses(message: str, change: Change) -> None:
    assert complaints(JOB) == []
    assert any(message in found for found in complaints(changed(change)))


@pytest.mark.parametrize(("kind", "change"), [
    ("NetworkPolicy", {"spec": {"podSelectors": {}}}), ("Job", {"spec": {"template": {"spec": {}}}}),
])  # fmt: skip
def test_kinds_of_kubernetes_are_checked_strictly(kind: str, change: dict[str, Any]) -> None:
    version = {"NetworkPolicy": "networking.k8s.io/v1", "Job": "batch/v1"}[kind]
    assert complaints({"apiVersion": version, "kind": kind, "metadata": {"name": "a"}, **change})


@needs_definitions
def test_the_definitions_have_no_rule_that_is_not_ported() -> None:
    """All CEL rules of the version that these files are written for; one more in a new version must be ported."""
    texts = cel(definition("RayJob")) | cel(definition("RayCluster"))
    about_changes = {"self == oldSelf"}  # of an object that exists; 'kubectl apply' reports it
    assert len(texts - about_changes) == 5


def cel(node: Any) -> set[str]:
    if isinstance(node, list):
        return set().union(*map(cel, node))
    if not isinstance(node, dict):
        return set()
    own = {entry["rule"] for entry in node.get("x-kubernetes-validations", [])}
    return own.union(*map(cel, node.values()))
