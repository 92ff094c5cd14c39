"""Checks of a Ray cluster: its dashboard, as `distrec submit` uses it, its head and its hosts."""

from __future__ import annotations

import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from distrec.doctor import host
from distrec.doctor.finding import Finding, failed, not_applicable, passed, refused
from distrec.doctor.storage import judged_clock, skew
from distrec.errors import InputError, first_few
from distrec.runtime import versions
from distrec.submission.cluster import Cluster, NoAnswer, OtherVersion, TokenRefused, UnknownJob, within

_ANSWER = 5.0  # seconds in which a port must answer
_HOSTS = 90.0  # seconds in which all hosts must have told about themselves; each starts a process
_NOBODY = "no dashboard is named; give --address"


@dataclass(frozen=True)
class Dashboard:
    """What the dashboard answered to the first question.

    Attributes:
        address: its URL.
        date: what the header `Date` says, in seconds since the epoch; None without one.
        before, after: our time before and after.
        error: why nothing answered.
    """

    address: str
    date: float | None = None
    before: float = 0.0
    after: float = 0.0
    error: str | None = None


def ask(address: str, limit: float = _ANSWER) -> Dashboard:
    """Ask a dashboard for its version; whatever it answers shows that something is there."""
    before = time.time()

    def answer() -> str | None:
        try:
            with urllib.request.urlopen(f"{address}/api/version", timeout=limit) as reply:
                return reply.headers.get("Date")
        except urllib.error.HTTPError as error:  # such as 401: it is there
            return error.headers.get("Date")

    try:
        date = within(limit + 1, answer)
    except (NoAnswer, OSError, ValueError) as error:
        return Dashboard(address, error=str(getattr(error, "reason", None) or error) or type(error).__name__)
    except Exception as error:  # http.client has errors of its own for what is no HTTP
        return Dashboard(address, error=f"it does not speak HTTP: {type(error).__name__}")
    try:
        there = parsedate_to_datetime(date).timestamp() if date else None
    except ValueError:
        there = None
    return Dashboard(address, there, before, time.time())


def dashboard(found: Dashboard | None) -> Finding:
    """Whether the port of the dashboard answers."""
    name = "dashboard"
    if found is None:
        return not_applicable(name, _NOBODY)
    if found.error is not None:
        return failed(
            name, f"{found.address} does not answer ({found.error})",
            "start the head with 'ray start --head --dashboard-host=0.0.0.0', and see whether a firewall lets its "
            "port 8265 through",
        )  # fmt: skip
    return passed(name, f"{found.address} answers")


def clock(found: Dashboard | None) -> Finding:
    """Whether the clock of the head and ours agree."""
    name = "head's clock"
    if found is None or found.error is not None or found.date is None:
        return not_applicable(name, _NOBODY if found is None else "the dashboard told no time")
    return judged_clock(name, "the head", skew(found.before, found.after, found.date))


def jobs(found: Dashboard | None) -> list[Finding]:
    """Whether the cluster takes our token, runs our version of Ray, and answers questions about jobs."""
    token, version, answers = names = ("token", "Ray version", "jobs")
    if found is None or found.error is not None:
        why = _NOBODY if found is None else "the dashboard does not answer"
        return [not_applicable(name, why) for name in names]
    unknown, taken = "not reached", passed(token, "the cluster takes what this environment sends")
    try:
        cluster = Cluster(found.address)
    except TokenRefused as error:
        trouble = refused(token, error, "give the cluster's token")
        return [trouble, not_applicable(version, unknown), not_applicable(answers, unknown)]
    except OtherVersion as error:
        return [taken, refused(version, error, "install the same environment here"), not_applicable(answers, unknown)]
    except InputError as error:
        trouble = refused(version, error, "give the address of a Ray dashboard")
        return [not_applicable(token, unknown), trouble, not_applicable(answers, unknown)]
    import ray

    done = [taken, passed(version, f"{ray.__version__} here and on the cluster")]
    try:
        cluster.details("distrec-doctor")
    except UnknownJob:
        pass  # as it should be
    except NoAnswer as error:
        trouble = failed(answers, f"the head does not answer ({error})", "see the dashboard's log on the head")
        return [*done, trouble]
    return [*done, passed(answers, "the head answers questions about jobs")]


def head_port(environment: Mapping[str, str], limit: float = _ANSWER) -> Finding:
    """Whether the port of the head answers that hosts join and drivers connect to."""
    name, address = "head", environment.get("RAY_ADDRESS", "")
    match = re.fullmatch(r"\[?([^\s/\]]+?)\]?:(\d{1,5})", address)
    if match is None:
        return not_applicable(name, "RAY_ADDRESS names no host and port")
    try:
        within(limit + 1, lambda: socket.create_connection((match[1], int(match[2])), timeout=limit).close())
    except (NoAnswer, OSError, OverflowError) as error:
        return failed(
            name, f"{address} does not answer ({error})",
            "see whether the head runs, and whether a firewall lets its port through; all ports between hosts must be "
            "open",
        )  # fmt: skip
    return passed(name, f"{address} answers")


def hosts(head: Finding, limit: float = _HOSTS) -> Finding:
    """Whether the hosts of the cluster that RAY_ADDRESS names have our packages and time, and pass their own checks."""
    name = "hosts"
    if head.state == "failed":
        return not_applicable(name, "the head does not answer")
    if head.state != "passed":
        return not_applicable(name, "this process is on no host of a cluster; submit it: distrec submit doctor")
    try:
        told = within(limit, _ask_hosts)
    except NoAnswer as error:
        return failed(name, f"not all of them told about themselves ({error})", "see 'ray status' on the head")
    wrong = [trouble for one in told for trouble in troubles(one)]
    listed = ", ".join(sorted(str(one["host"]) for one in told))
    if wrong:
        return failed(name, "; ".join(wrong), "run 'distrec doctor' on these hosts for the remedies")
    return passed(name, f"{len(told)} with the same packages and time, and no failed check: {listed}")


def troubles(told: Mapping[str, Any]) -> list[str]:
    """What is wrong with a host, in a few words each; `told` is as `tell` returns it, with its `skew`."""
    where, found = told["host"], []
    ours = versions()
    other = [package for package in ours if told["versions"].get(package) != ours[package]]
    if other:
        listed = (f"{package} {told['versions'].get(package, 'missing')}, not {ours[package]}" for package in other)
        found.append(f"{where} has {first_few(listed, len(other))}")
    verdict = judged_clock("", where, told["skew"])
    if verdict.state == "failed":
        found.append(verdict.found)
    return found + [f"{where}: {check}: {what}" for check, what in told["failed"]]


def tell() -> dict[str, Any]:
    """What a host tells about itself: its name, packages, and what its own checks found wrong."""
    import os

    wrong = [(found.name, found.found) for found in host.of_every_host(os.environ) if found.state == "failed"]
    return {"host": socket.gethostname(), "versions": versions(), "failed": wrong}


def _ask_hosts() -> list[dict[str, Any]]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from distrec.cluster.connection import ray_cluster

    class Witness:
        def tell(self) -> dict[str, Any]:
            return tell()

        def time(self) -> float:
            return time.time()

    with ray_cluster():
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        actor: Any = ray.remote(Witness)
        actors = [actor.options(num_cpus=0, scheduling_strategy=place).remote() for place in there]
        told: list[dict[str, Any]] = ray.get([one.tell.remote() for one in actors])
        for one, facts in zip(actors, told, strict=True):
            before = time.time()
            seen = ray.get(one.time.remote())
            facts["skew"] = skew(before, time.time(), seen, step=0.0)
    return told
