"""What KubeRay 1.7 refuses and its schema does not say: its CEL rules and its own validation, as rules for manifests.

No API server and no operator runs here. Each rule has a test with a manifest that breaks it. Rules of the operator for
what `distrec manifest` never writes (Redis, sidecars, suspended worker groups) are here as refusals of these fields.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import yaml

LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
MOST = {"RayJob": 47, "RayCluster": 50}
MANAGERS = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")


def refusals(manifest: dict[str, Any]) -> list[str]:
    """Why KubeRay would refuse a RayJob or RayCluster, or would not do what it says."""
    spec, kind = manifest["spec"], manifest["kind"]
    found = [*_metadata(manifest["metadata"], MOST[kind])]
    if kind == "RayJob":
        found += _job(spec)
    cluster = spec.get("rayClusterSpec") if kind == "RayJob" else spec
    if cluster is not None:
        found += _cluster(cluster)
    return found


def _metadata(metadata: dict[str, Any], most: int) -> Iterator[str]:
    if len(metadata["name"]) > most:
        yield f"name is longer than {most} characters"
    if not LABEL.fullmatch(metadata["name"]) or len(metadata["name"]) > 63:
        yield "name is no DNS-1035 label"
    for value in metadata.get("labels", {}).values():
        if not LABEL_VALUE.fullmatch(value) or len(value) > 63:
            yield f"label value {value!r} is invalid"


def _job(spec: dict[str, Any]) -> Iterator[str]:
    mode, selector = spec.get("submissionMode", "K8sJobMode"), spec.get("clusterSelector")
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield "suspend needs shutdownAfterJobFinishes"
    if spec.get("suspend") and selector:
        yield "suspend does not go with clusterSelector"
    if spec.get("rayClusterSpec") is None and not selector:
        yield "one of rayClusterSpec and clusterSelector must be set"
    if selector is not None and not selector.get("ray.io/cluster"):
        yield "clusterSelector names no cluster"
    if mode not in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"):
        yield "submissionMode is unknown"
    if mode == "SidecarMode" and (selector or "submitterPodTemplate" in spec or "submitterConfig" in spec):
        yield "SidecarMode has no clusterSelector, submitterPodTemplate or submitterConfig"
    if spec.get("backoffLimit", 0) < 0:
        yield "backoffLimit is negative"
    if spec.get("backoffLimit", 0) > 0 and (mode == "InteractiveMode" or selector):
        yield "backoffLimit does not go with InteractiveMode or clusterSelector"
    for name in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if name in spec and spec[name] <= 0:
            yield f"{name} is not positive"
    if spec.get("ttlSecondsAfterFinished", 0) < 0:
        yield "ttlSecondsAfterFinished is negative"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if spec.get("managedBy", MANAGERS[0]) not in MANAGERS:
        yield "managedBy is unknown"
    yield from _deletion(spec)
    yield from _submitter(spec)


def _deletion(spec: dict[str, Any]) -> Iterator[str]:
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    legacy = [name for name in ("onSuccess", "onFailure") if name in strategy]
    if legacy and "deletionRules" in strategy:
        yield "deletionRules do not go with onSuccess or onFailure"
    if len(legacy) < 2 and not strategy.get("deletionRules"):
        yield "deletionStrategy needs both onSuccess and onFailure, or deletionRules"
    if "deletionRules" in strategy and spec.get("shutdownAfterJobFinishes"):
        yield "deletionRules do not go with shutdownAfterJobFinishes"
    for rule in strategy.get("deletionRules", []):
        if len({"jobStatus", "jobDeploymentStatus"} & rule["condition"].keys()) != 1:
            yield "a deletion condition needs either jobStatus or jobDeploymentStatus"


def _submitter(spec: dict[str, Any]) -> Iterator[str]:
    """The operator pastes texts into a shell line: the entrypoint as it is, others inside double quotation marks."""
    entrypoint = spec.get("entrypoint", "").strip()
    if not entrypoint or any(shlex.quote(word) != word for word in entrypoint.split(" ")):
        yield "entrypoint is read by a shell"
    for name in ("runtimeEnvYAML", "entrypointResources"):
        if re.search(r"[$`!]", spec.get(name, "")):
            yield f"{name} is expanded by a shell"
    try:
        if not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), dict):
            yield "runtimeEnvYAML is no mapping"
    except yaml.YAMLError:
        yield "runtimeEnvYAML is no YAML"


def _cluster(spec: dict[str, Any]) -> Iterator[str]:
    head, groups = spec["headGroupSpec"], spec.get("workerGroupSpecs", [])
    if spec.get("managedBy", MANAGERS[0]) not in MANAGERS:
        yield "managedBy is unknown"
    for group in (head, *groups):
        yield from _group(group)
    names = [group["groupName"] for group in groups]
    if len(set(names)) < len(names):
        yield "two worker groups have one name"
    if not head["template"]["spec"].get("containers"):
        return
    env = {entry["name"]: entry.get("value") for entry in head["template"]["spec"]["containers"][0].get("env", [])}
    if "gcsFaultToleranceOptions" in spec or env.keys() & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}:
        yield "Redis is set up"
    scaling, options = spec.get("enableInTreeAutoscaling", False), spec.get("autoscalerOptions", {})
    if not scaling and env.get("RAY_enable_autoscaler_v2") in ("1", "true"):
        yield "autoscaler v2 without autoscaling"
    if scaling:
        if any(group.get("suspend") for group in groups):
            yield "a worker group is suspended with autoscaling"
        if "version" in options and "RAY_enable_autoscaler_v2" in env:
            yield "the version of the autoscaler is set twice"
        if options.get("version") == "v2":
            policies = {group["template"]["spec"].get("restartPolicy", "Never") for group in (head, *groups)}
            if policies != {"Never"}:
                yield "restartPolicy must be Never with autoscaler v2"
        if head["template"]["spec"].get("automountServiceAccountToken") is False:
            yield "the autoscaler has no token of the Kubernetes API"
    if spec.get("authOptions", {}).get("mode") == "token":
        version = spec.get("rayVersion", "")
        if not re.fullmatch(r"\d+\.\d+\.\d+", version) or tuple(map(int, version.split("."))) < (2, 52, 0):
            yield "token authentication needs rayVersion 2.52.0 or later"
        for group in (head, *groups):
            if any(entry["name"] == "RAY_AUTH_MODE" for entry in group["template"]["spec"]["containers"][0]["env"]):
                yield "RAY_AUTH_MODE is set by hand and by the operator"


def _group(group: dict[str, Any]) -> Iterator[str]:
    name, parameters = group.get("groupName", "head"), group.get("rayStartParams", {})
    containers = group["template"]["spec"].get("containers", [])
    if not containers:
        yield f"group {name} has no container"
        return
    if {"num-cpus", "num-gpus", "memory", "resources"} & parameters.keys() and group.get("resources"):
        yield f"group {name} has resources twice"
    if "labels" in parameters:
        yield f"group {name} has labels in rayStartParams"
    if any(not isinstance(value, str) for value in parameters.values()):
        yield f"group {name} has a parameter that is no text"
    if "groupName" in group:
        if not group["minReplicas"] <= group.get("replicas", 0) <= group["maxReplicas"]:
            yield f"group {name} has replicas outside of minReplicas and maxReplicas"
        cpus = containers[0].get("resources", {}).get("limits", {}).get("cpu", "0")
        if not re.fullmatch(r"[1-9][0-9]*", str(cpus)):
            yield f"group {name} has a part of a CPU, which Ray would be told as a whole one"
