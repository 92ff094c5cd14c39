"""A small operator for RayJobs in a lab: it runs what a rendered manifest says, as KubeRay would on Kubernetes.

It derives the pods of a RayJob (`rayjob.py`), puts each on a host of its own (`kubelet.py`), submits the job once all
pods are ready, and follows status, retries and deadlines in the states of KubeRay 1.7 (`rayjob_controller.go`). Thus
the content of a manifest can train a model, fail and be retried where no Kubernetes can run.

It is not KubeRay, and tests the manifest rather than the operator: there is no API server, scheduler, autoscaler or
network policy; a pod whose host is lost is not replaced; a job whose submitter does not end after it is left waiting.
"""

from __future__ import annotations

import json
import random
import string
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.error import HTTPError

from tests.lab.cluster import ENDED, http
from tests.lab.hosts import Lab
from tests.lab.kubelet import Placed
from tests.lab.rayjob import AGENT, DASHBOARD, RayJob

HEAD, WORKERS, SUBMITTER = "head", ("w1", "w2", "w3"), "client"  # the hosts of the pods
_EVERY = 1.0  # seconds between two looks


@dataclass(frozen=True)
class Status:
    """The status of a RayJob, with the words of KubeRay.

    Attributes:
        deployment: `jobDeploymentStatus`: "" at first, Initializing, Running, Retrying, Complete or Failed.
        job: `jobStatus`, the status of the Ray job.
        cluster: `rayClusterName` of this attempt.
        submission: `jobId` of this attempt.
        failed: how many attempts have failed.
        since: when this attempt began, in seconds of the monotonic clock.
        silent: since when the status of the job could not be had; None if it could.
    """

    deployment: str = ""
    job: str = ""
    reason: str = ""
    cluster: str = ""
    submission: str = ""
    failed: int = 0
    since: float = 0.0
    silent: float | None = None


@dataclass(frozen=True)
class Sight:
    """What can be seen of an attempt.

    Attributes:
        ready: whether every pod of the cluster is ready.
        submitter: the exit status of the last submitter that will be tried; None while one runs or may be tried.
        job: the status of the Ray job; None if the cluster does not know it or does not answer.
    """

    ready: bool = False
    submitter: int | None = None
    job: str | None = None


def judge(status: Status, rayjob: RayJob, seen: Sight, now: float, patience: float = 300) -> Status:
    """The next status of an attempt that is Initializing or Running.

    Args:
        now: seconds of the monotonic clock.
        patience: seconds for which the status of a running job may be missing.
    """
    status = _judged(status, rayjob, seen, now, patience)
    if status.deployment != "Failed":
        return status
    status = replace(status, failed=status.failed + 1)
    if status.failed <= rayjob.retries and status.reason != "DeadlineExceeded":
        return replace(status, deployment="Retrying")
    return status


def _judged(status: Status, rayjob: RayJob, seen: Sight, now: float, patience: float) -> Status:
    if rayjob.deadline is not None and now >= status.since + rayjob.deadline:
        return replace(status, deployment="Failed", reason="DeadlineExceeded")
    if status.deployment == "Initializing":
        if rayjob.start_deadline is not None and now >= status.since + rayjob.start_deadline:
            return replace(status, deployment="Failed", reason="PreRunningDeadlineExceeded")
        return replace(status, deployment="Running") if seen.ready else status
    if seen.submitter:
        reason = "AppFailed" if status.job == "FAILED" else "SubmissionFailed"
        return replace(status, deployment="Failed", reason=reason)
    if seen.job is None:
        if seen.submitter is not None:
            return replace(status, deployment="Failed", reason="AppFailed")  # its cluster has lost the job
        silent = now if status.silent is None else status.silent
        if now >= silent + patience:
            return replace(status, deployment="Failed", reason="JobStatusCheckTimeoutExceeded")
        return replace(status, silent=silent)
    status = replace(status, job=seen.job, silent=None)
    if seen.job not in ENDED or seen.submitter is None:
        return status
    if seen.job == "FAILED":
        return replace(status, deployment="Failed", reason="AppFailed")
    return replace(status, deployment="Complete")


class Operator:
    """Runs one RayJob on the hosts of a lab, which must be free of other pods and of Ray.

    Args:
        patience: seconds for which the status of a running job may be missing. KubeRay waits for minutes.

    Attributes:
        status: the status now.
        history: every status that differed from the one before in its deployment, in order.
    """

    def __init__(self, lab: Lab, documents: Iterable[Mapping[str, Any]], patience: float = 300):
        self.lab, self.rayjob, self._patience = lab, RayJob(documents), patience
        self.status = Status()
        self.history: list[Status] = []
        self.pods: dict[str, Placed] = {}  # of the cluster, by host
        self.submitter: Placed | None = None
        self._tries = 0  # of this attempt's submitter
        self._end = 0.0

    def wait_for(self, *deployments: str, timeout: float) -> Status:
        """Go on until the status is one of `deployments`, and return it.

        Raises:
            TimeoutError: it is not within `timeout` seconds; the message ends with what the pods have written.
        """
        deadline = time.monotonic() + timeout
        while self.status.deployment not in deployments:
            self.reconcile()
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"not {' or '.join(deployments)} within {timeout:.0f} s: {self.status}\n{self.text()}"
                )
            time.sleep(_EVERY)
        return self.status

    def reconcile(self) -> None:
        """Look once, and do what follows."""
        status, now = self.status, time.monotonic()
        if status.deployment == "":
            suffix = "".join(random.choices(string.ascii_lowercase + string.digits, k=5))
            name = f"{self.rayjob.name}-{suffix}"
            new = replace(Status(failed=status.failed), deployment="Initializing", since=now, cluster=name,
                          submission=self.rayjob.submission(suffix))  # fmt: skip
            self._create_cluster(new)
        elif status.deployment in ("Initializing", "Running"):
            new = judge(status, self.rayjob, self._look(), now, self._patience)
        elif status.deployment == "Retrying":
            self.delete()
            new = Status(failed=status.failed)
        else:
            if self.pods and self.rayjob.lifetime is not None and now >= self._end + self.rayjob.lifetime:
                self._delete_cluster()
            return
        if new.deployment == "Running" and status.deployment == "Initializing":
            self._submit(new)
        if new.deployment in ("Complete", "Failed"):
            self._end = now
        if new.deployment != status.deployment:
            self.history.append(new)
        self.status = new

    def delete(self) -> None:
        """End all pods."""
        self._delete_cluster()
        if self.submitter is not None:
            self.submitter.end()
            self.submitter, self._tries = None, 0

    def text(self) -> str:
        """What the pods have written."""
        pods = [*self.pods.values(), *([self.submitter] if self.submitter else [])]
        return "\n".join(pod.text()[-3000:] for pod in pods)

    # Pods -----------------------------------------------------------------------------------------------------------

    def _create_cluster(self, status: Status) -> None:
        workers = self.rayjob.workers(status.cluster, [self.lab[name].address for name in WORKERS])
        if len(workers) > len(WORKERS):
            raise ValueError(f"the lab has {len(WORKERS)} hosts for workers, but the manifest asks for {len(workers)}")
        head = self.rayjob.head(status.cluster, self.lab[HEAD].address)
        for name, pod in zip((HEAD, *WORKERS), (head, *workers), strict=False):
            self.pods[name] = Placed(self.lab[name], pod, self._names(status))
            self.pods[name].advance()

    def _delete_cluster(self) -> None:
        for pod in self.pods.values():  # all are asked to end before one is waited for
            pod.ask()
        for pod in self.pods.values():
            pod.end()
        self.pods = {}

    def _submit(self, status: Status) -> None:
        pod = self.rayjob.submitter(status.cluster, status.submission)
        if self.submitter is not None:
            self.submitter.end()
        self.submitter = Placed(self.lab[SUBMITTER], pod, self._names(status))
        self.submitter.advance()
        self._tries += 1

    def _names(self, status: Status) -> dict[str, str]:
        """Host names and addresses, as the name server of the cluster would give them."""
        service, address = self.rayjob.service(status.cluster), self.lab[HEAD].address
        hosts = {host.name: host.address for host in self.lab.hosts.values()}
        return {**hosts, service: address, service.partition(".")[0]: address}

    # What is seen ---------------------------------------------------------------------------------------------------

    def _look(self) -> Sight:
        for pod in self.pods.values():
            pod.advance()
        if self.status.deployment == "Initializing":
            return Sight(ready=all(self._is_ready(pod) for pod in self.pods.values()))
        assert self.submitter is not None
        ended = self.submitter.status
        if ended and self._tries <= self.rayjob.submitter_retries:
            self._submit(self.status)
            ended = None
        return Sight(submitter=ended, job=self._job_status())

    def _is_ready(self, pod: Placed) -> bool:
        """What KubeRay's probes ask: the agent of the pod's Ray, and on the head its dashboard too."""
        if not pod.runs:
            return False
        ports = [f"{AGENT}/api/healthz", *([f"{DASHBOARD}/api/gcs_healthz"] if pod.host.name == HEAD else [])]
        try:
            return all(
                "success" in pod.host.inside(lambda port=port: http(f"http://127.0.0.1:{port}")) for port in ports
            )
        except OSError:
            return False

    def _job_status(self) -> str | None:
        url = f"http://{self.lab[HEAD].address}:{DASHBOARD}/api/jobs/{self.status.submission}"
        assert self.submitter is not None
        token = self.submitter.pod.main.environment.get("RAY_AUTH_TOKEN", "")
        try:
            return str(json.loads(self.lab[SUBMITTER].inside(lambda: http(url, token)))["status"])
        except HTTPError as error:
            if error.code == 404:
                return None
            raise
        except OSError:
            return None
