"""What KubeRay makes of a RayJob: the pods of a cluster and of its submitter, with the commands that run in them.

It follows what KubeRay 1.7 does in `K8sJobMode` (`pod.go` and `job.go` there), written anew. It is not KubeRay: it
tests what a manifest says, and knows no more fields than these tests need.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any

import yaml

from tests.lab.pods import Documents, Mount, Pod, known, quantity

AGENT, DASHBOARD, GCS = 52365, 8265, 6379  # ports; AGENT is that of a pod's health check
_METRICS = 8080
_SHARED_MEMORY = "/dev/shm"
# Fields that change nothing of what runs inside the pods.
_CLUSTER = {"rayVersion", "networkPolicy", "upgradeStrategy"}
_GROUP = {"groupName", "minReplicas", "maxReplicas", "serviceType", "headService"}
_SUBMITTER = {"spec": {"containers": [{"name": "ray-job-submitter"}], "restartPolicy": "Never"}}
# These options of `ray start` take "true" or "false" as a value; all others are switches.
_WITH_TRUTH = ("log-color", "include-dashboard", "include-log-monitor")


class RayJob(Documents):
    """A RayJob among rendered documents, and the pods that KubeRay makes of it."""

    def __init__(self, documents: Iterable[Mapping[str, Any]]):
        super().__init__(documents, "RayJob")
        self._tokens: dict[str, str] = {}  # by cluster
        self._spec = known(self.document["spec"], "RayJob.spec", {
            "activeDeadlineSeconds", "backoffLimit", "entrypoint", "entrypointNumCpus", "entrypointNumGpus",
            "entrypointResources", "jobId", "metadata", "preRunningDeadlineSeconds", "rayClusterSpec",
            "runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode", "submitterConfig", "submitterPodTemplate",
            "suspend", "ttlSecondsAfterFinished",
        })  # fmt: skip
        if self._spec.get("submissionMode", "K8sJobMode") != "K8sJobMode" or self._spec.get("suspend"):
            raise ValueError("the harness knows only jobs in K8sJobMode that are not suspended")
        self._cluster = known(
            self._spec["rayClusterSpec"], "rayClusterSpec",
            {"authOptions", "headGroupSpec", "workerGroupSpecs"} | _CLUSTER,
        )  # fmt: skip
        if "ray.io/overwrite-container-cmd" in self.document["metadata"].get("annotations", {}):
            raise ValueError("the harness does not know annotation ray.io/overwrite-container-cmd")

    # How the job runs -----------------------------------------------------------------------------------------------

    @property
    def retries(self) -> int:
        """How often a failed job is started again, each time on a new cluster."""
        return int(self._spec.get("backoffLimit", 0))

    @property
    def submitter_retries(self) -> int:
        """How often a failed submitter is started again, with the same submission id."""
        return int(self._spec.get("submitterConfig", {}).get("backoffLimit", 2))

    @property
    def deadline(self) -> float | None:
        """Seconds from the start of an attempt to its end."""
        return self._spec.get("activeDeadlineSeconds")

    @property
    def start_deadline(self) -> float | None:
        """Seconds from the start of an attempt until its job must have been submitted."""
        return self._spec.get("preRunningDeadlineSeconds")

    @property
    def lifetime(self) -> float | None:
        """Seconds for which a cluster stays after the end of the job; None if it stays for good."""
        return self._spec.get("ttlSecondsAfterFinished", 0) if self._spec.get("shutdownAfterJobFinishes") else None

    def submission(self, suffix: str) -> str:
        """The submission id of an attempt, which KubeRay ends with five random characters."""
        return str(self._spec.get("jobId") or f"{self.name}-{suffix}")

    def service(self, cluster: str) -> str:
        """The host name of a cluster's head."""
        return f"{cluster}-head-svc.{self.namespace}.svc.cluster.local"

    # Pods -----------------------------------------------------------------------------------------------------------

    def head(self, cluster: str, address: str = "") -> Pod:
        """The pod of the head.

        Args:
            cluster: the name of the cluster.
            address: what the pod sees as its own address.
        """
        group = known(self._cluster["headGroupSpec"], "headGroupSpec", {"rayStartParams", "template", "resources",
                       "labels"} | _GROUP)  # fmt: skip
        return self._ray_pod(cluster, f"{cluster}-head", group, address, head=True)

    def workers(self, cluster: str, addresses: Sequence[str] = ()) -> list[Pod]:
        """The pods of the workers, as many as `replicas` of their groups say."""
        pods: list[Pod] = []
        for group in self._cluster.get("workerGroupSpecs", ()):
            known(group, "workerGroupSpecs", {"rayStartParams", "template", "resources", "labels", "replicas",
                   "numOfHosts"} | _GROUP)  # fmt: skip
            if group.get("numOfHosts", 1) != 1:
                raise ValueError("the harness knows only worker groups of one host per replica")
            for number in range(group.get("replicas", 0)):
                name = f"{cluster}-{group['groupName']}-worker-{number}"
                address = addresses[len(pods)] if addresses else ""
                pods.append(self._ray_pod(cluster, name, group, address, head=False))
        return pods

    def submitter(self, cluster: str, submission: str) -> Pod:
        """The pod that submits the job to a cluster and follows its log."""
        template = self._spec.get("submitterPodTemplate") or _SUBMITTER
        service = f"{self.service(cluster)}:{DASHBOARD}"
        own = {"PYTHONUNBUFFERED": "1", "RAY_DASHBOARD_ADDRESS": service, "RAY_JOB_SUBMISSION_ID": submission}
        command: tuple[str, ...] = ()
        if not template["spec"]["containers"][0].get("command"):
            command = ("/bin/bash", "-ce", "--", submit_line(self._spec, f"http://{service}", submission))
        return self.pod(f"{submission}-submitter", template, command, own, self._access(cluster))

    def _ray_pod(self, cluster: str, name: str, group: Mapping[str, Any], address: str, head: bool) -> Pod:
        container = group["template"]["spec"]["containers"][0]
        port = str(self._cluster["headGroupSpec"].get("rayStartParams", {}).get("port", GCS))
        gcs = f"{self.service(cluster)}:{port}"
        start = f"ray start{' --head' if head else ''} {options(start_parameters(group, head, gcs))}"
        line = f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {start}"
        if before := " ".join((*container.get("command", ()), *container.get("args", ()))):
            line = before if "ray start" in before else f"{before} && {line}"
        own = {
            "RAY_CLUSTER_NAME": cluster, "RAY_CLUSTER_NAMESPACE": self.namespace, "RAY_CLOUD_INSTANCE_ID": name,
            "RAY_NODE_TYPE_NAME": "headgroup" if head else group["groupName"], "KUBERAY_GEN_RAY_START_CMD": start,
        }  # fmt: skip
        if not head:
            own |= {"FQ_RAY_IP": self.service(cluster), "RAY_IP": f"{cluster}-head-svc"}
        # These do not replace what the manifest says.
        usual = {
            "RAY_PORT": port, "RAY_ADDRESS": f"127.0.0.1:{port}" if head else gcs,
            "RAY_USAGE_STATS_KUBERAY_IN_USE": "1", "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1", **self._access(cluster),
        }  # fmt: skip
        pod = self.pod(name, group["template"], ("/bin/bash", "-c", "--", line), own, usual, address)
        if not head:
            loop = f"until ray health-check --address {gcs} > /dev/null 2>&1; do echo 'waiting'; sleep 5; done"
            # It gets the worker's `env`, but not its `envFrom`.
            names = {entry["name"] for entry in container.get("env", ())} | {"FQ_RAY_IP", "RAY_IP"} | usual.keys()
            variables = {name: value for name, value in pod.main.environment.items() if name in names}
            wait = replace(pod.main, name="wait-gcs-ready", command=("/bin/bash", "-c", "--", loop),
                           environment=variables, folder="")  # fmt: skip
            pod = replace(pod, init=(*pod.init, wait))
        if all(mount.path != _SHARED_MEMORY for mount in pod.main.mounts):
            resources = container.get("resources", {})
            size = resources.get("limits", {}).get("memory") or resources.get("requests", {}).get("memory") or "64Mi"
            memory = Mount(_SHARED_MEMORY, "shared-mem", memory=ceil(quantity(size)))
            pod = replace(pod, main=replace(pod.main, mounts=(*pod.main.mounts, memory)))
        return pod

    def _access(self, cluster: str) -> dict[str, str]:
        """What `authOptions` adds to the environment. Without a Secret, the operator makes a token for each cluster."""
        access = known(self._cluster.get("authOptions", {}), "authOptions", {"mode", "secretName"})
        if access.get("mode", "disabled") == "disabled":
            return {}
        if "secretName" in access:
            token = self.contents("Secret", access["secretName"])["auth_token"].decode()
        else:
            token = self._tokens.setdefault(cluster, secrets.token_hex(16))
        return {"RAY_AUTH_MODE": access["mode"], "RAY_AUTH_TOKEN": token}


def start_parameters(group: Mapping[str, Any], head: bool, gcs: str) -> dict[str, str]:
    """The options of `ray start` for the pods of a group.

    Args:
        group: `headGroupSpec` or an entry of `workerGroupSpecs`.
        gcs: host and port of the head.
    """
    parameters = {name: str(value) for name, value in group.get("rayStartParams", {}).items()}
    custom: dict[str, float] = {}
    for name, amount in group.get("resources", {}).items():
        if (option := _ray_name(name)) is not None:
            parameters[option] = str(ceil(quantity(amount)))
        else:
            custom[name] = float(quantity(amount))
    if custom:
        parameters["resources"] = f"'{json.dumps(custom)}'"
    if group.get("labels"):
        parameters["labels"] = ",".join(f"{name}={value}" for name, value in sorted(group["labels"].items()))
    if head:
        parameters.setdefault("dashboard-host", "0.0.0.0")
    else:
        parameters.setdefault("address", gcs)
    parameters.setdefault("metrics-export-port", str(_METRICS))
    parameters.setdefault("dashboard-agent-listen-port", str(AGENT))
    parameters["block"] = "true"
    resources = group["template"]["spec"]["containers"][0].get("resources", {})
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    sizes = {"num-cpus": limits.get("cpu") or requests.get("cpu"), "memory": limits.get("memory")}
    sizes["num-gpus"] = next((amount for name, amount in sorted(limits.items()) if name.endswith("gpu")), None)
    for name, amount in sizes.items():
        if amount is not None and quantity(amount):
            parameters.setdefault(name, str(ceil(quantity(amount))))
    return parameters


def options(parameters: Mapping[str, str]) -> str:
    """Parameters of `ray start` as they are on its command line, which a shell reads."""
    found = []
    for name, value in sorted(parameters.items()):
        if value.lower() not in ("true", "false") or name in _WITH_TRUTH:
            found.append(f"--{name}={value}")
        elif value.lower() == "true":
            found.append(f"--{name}")
    return " ".join(found)


def submit_line(spec: Mapping[str, Any], address: str, submission: str) -> str:
    """The line of shell that submits a job, unless a job of this id is there, and follows its log.

    The entrypoint is part of the line as it is, so the shell of the submitter reads its quotes, `$` and `;`.
    """
    probe = f"import urllib.request; urllib.request.urlopen('{address}/api/gcs_healthz', timeout=5)"
    submit = ["ray job submit", "--address", address, "--no-wait"]
    if spec.get("runtimeEnvYAML"):
        submit += ["--runtime-env-json", json.dumps(json.dumps(yaml.safe_load(spec["runtimeEnvYAML"])))]
    if spec.get("metadata"):
        submit += ["--metadata-json", json.dumps(json.dumps(spec["metadata"]))]
    submit += ["--submission-id", submission]
    for option, name in (("cpus", "entrypointNumCpus"), ("gpus", "entrypointNumGpus")):
        if spec.get(name):
            submit += [f"--entrypoint-num-{option}", f"{spec[name]:f}"]
    if spec.get("entrypointResources"):
        submit += ["--entrypoint-resources", json.dumps(spec["entrypointResources"])]
    return (
        f'until python3 -c "{probe}" >/dev/null 2>&1 ; do echo "waiting for {address}" ; sleep 2 ; done ; '
        f"if ! ray job status --address {address} {submission} >/dev/null 2>&1 ; "
        f"then {' '.join(submit)} -- {spec['entrypoint'].strip()} ; fi ; "
        f"ray job logs --address {address} --follow {submission}"
    )


def _ray_name(resource: str) -> str | None:
    """The option of `ray start` for a resource of Kubernetes."""
    return "num-gpus" if resource.lower().endswith("gpu") else {"cpu": "num-cpus", "memory": "memory"}.get(resource)
