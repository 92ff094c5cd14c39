"""Checks of a cluster: servers that are none, and a real head that wants a token."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from distrec.doctor import cluster
from distrec.doctor.cluster import ask, head_port, hosts, troubles
from distrec.doctor.finding import Finding, failed, not_applicable, passed
from distrec.runtime import versions
from tests.one_answer import server
from tests.ray_head import Head, free_ports, ray_head

REPOSITORY = Path(__file__).resolve().parents[2]
TOKEN = "planted-token-" + "4e8d" * 12
OURS = json.dumps({"version": "4", "ray_version": ray.__version__, "ray_commit": "x", "session_name": "s"})
THEIRS = OURS.replace(ray.__version__, "2.1.0")


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen(8)
        yield one.getsockname()[1]


def test_an_address_at_which_nobody_is(silent: int) -> None:
    (closed,) = free_ports(1)
    for url, told in (
        (f"http://127.0.0.1:{closed}", "refused"), (f"http://127.0.0.1:{silent}", "timed out"),
        ("http://no-such-host.invalid:8265", "does not answer ("),
    ):  # fmt: skip
        found = cluster.dashboard(ask(url, limit=0.5))
        assert (found.state, told in found.found) == ("failed", True), found
        assert "ray start --head" in str(found.remedy)
        assert [one.state for one in cluster.jobs(ask(url, limit=0.5))] == ["not applicable"] * 3
        assert cluster.clock(ask(url, limit=0.5)).state == "not applicable"


def test_without_an_address_nothing_is_asked() -> None:
    found = [cluster.dashboard(None), cluster.clock(None), *cluster.jobs(None)]
    assert {one.state for one in found} == {"not applicable"}
    assert {one.found for one in found} == {"no dashboard is named; give --address"}


@pytest.mark.parametrize(
    ("status", "body", "states", "told"),
    [
        (200, "<html>", ["not applicable", "failed", "not applicable"], "does not answer like a Ray dashboard"),
        (200, THEIRS, ["passed", "failed", "not applicable"], "runs Ray 2.1.0, but this environment has"),
        (401, "", ["failed", "not applicable", "not applicable"], "asks for a token, and none was sent"),
        (403, "", ["failed", "not applicable", "not applicable"], "refuses this token"),
        (200, OURS, ["passed", "passed", "failed"], "the head does not answer"),
    ],
)  # fmt: skip
def test_servers_that_are_no_dashboard(status: int, body: str, states: list[str], told: str) -> None:
    with server(status, body) as url:
        asked = ask(url)
        assert cluster.dashboard(asked).state == "passed"
        found = cluster.jobs(asked)
    assert [one.name for one in found] == ["token", "Ray version", "jobs"]
    assert [one.state for one in found] == states
    (wrong,) = (one for one in found if one.state == "failed")
    assert told in wrong.found
    assert wrong.remedy


@pytest.mark.parametrize(("ahead", "state"), [(0, "passed"), (3600, "failed"), (-3600, "failed")])
def test_the_clock_of_the_head(ahead: float, state: str) -> None:
    with server(200, OURS, ahead) as url:
        found = cluster.clock(ask(url))
    assert found.state == state
    assert ("NTP" in str(found.remedy)) == (state == "failed")


@pytest.mark.parametrize("address", ["", "auto", "local", "http://head:8265", "ray://head:10001"])
def test_an_address_without_host_and_port_is_not_examined(address: str) -> None:
    assert head_port({"RAY_ADDRESS": address}).state == "not applicable"


def test_the_port_of_the_head(silent: int) -> None:
    assert head_port({"RAY_ADDRESS": f"127.0.0.1:{silent}"}).state == "passed"
    (closed,) = free_ports(1)
    for address in (f"127.0.0.1:{closed}", "127.0.0.1:99999", "no-such-host.invalid:6379"):
        assert head_port({"RAY_ADDRESS": address}, limit=1).state == "failed"


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ({}, []),
        ({"skew": 99.0}, ["the clock of w2 is 99 s ahead of ours"]),
        ({"versions": {**versions(), "ray": "2.1.0"}}, [f"w2 has ray 2.1.0, not {versions()['ray']}"]),
        ({"failed": [("open files", "at most 9")]}, ["w2: open files: at most 9"]),
    ],
)
def test_what_is_wrong_with_a_host(told: dict[str, Any], found: list[str]) -> None:
    assert troubles({"host": "w2", "versions": versions(), "skew": 0.0, "failed": [], **told}) == found


def test_hosts_are_asked_from_a_host_only() -> None:
    for head in (failed("head", "", ""), not_applicable("head", "")):
        assert hosts(head).state == "not applicable"


def test_hosts_that_do_not_tell_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(cluster, "_ask_hosts", threading.Event().wait)
    found = hosts(passed("head", ""), limit=0.1)
    assert (found.state, "no answer within 0 s" in found.found) == ("failed", True)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head that wants a token."""
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    with ray_head(tmp_path_factory.mktemp("head"), 1, {**os.environ, **secret}) as started:
        yield started


def examined(head: Head, *arguments: str, **environment: str) -> dict[str, Finding]:
    """What `distrec doctor --json` prints on the head's host, by the name of the check."""
    done = subprocess.run(
        [sys.executable, "-m", "distrec.cli", "doctor", "--json", *arguments], cwd=REPOSITORY, timeout=200,
        env={**head.environment, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert TOKEN not in done.stdout + done.stderr
    assert "wrong-token" not in done.stdout + done.stderr
    tree = json.loads(done.stdout)
    assert done.returncode == (1 if tree["failed"] else 0)
    return {one["name"]: Finding(**one) for one in tree["checks"]}


CHECKS = ("dashboard", "head's clock", "token", "Ray version", "jobs")


@pytest.mark.multiprocess
def test_a_head_that_wants_a_token(head: Head, tmp_path: Path) -> None:
    found = examined(head, "--address", head.address)
    assert {name: found[name].state for name in CHECKS} == dict.fromkeys(CHECKS, "passed"), found
    for environment, told in (
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}, "asks for a token, and none was sent"),
        ({"RAY_AUTH_TOKEN": "wrong-token" + "b" * 40}, "refuses this token"),
    ):
        found = examined(head, RAY_API_SERVER_ADDRESS=head.address, **environment)
        assert [found[name].state for name in CHECKS[:2]] == ["passed", "passed"]
        assert found["token"].state == "failed"
        assert told in found["token"].found
        assert "RAY_AUTH_TOKEN_PATH" in str(found["token"].remedy)


@pytest.mark.multiprocess
def test_every_host_examines_itself(head: Head, tmp_path: Path) -> None:
    mine = {"RAY_ADDRESS": head.cluster, "TORCH_EXTENSIONS_DIR": str(tmp_path)}  # those of hosts are in their home
    found = examined(head, **mine)
    assert found["head"].state == "passed"
    assert found["hosts"].state == "passed", found["hosts"]
    assert found["hosts"].found.startswith("1 with the same packages and time, and no failed check")
    lock = Path(head.environment["HOME"]) / ".cache/torch_extensions/py311_cpu/x/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    found = examined(head, **mine)
    assert found["extension locks"].state == "passed"
    assert found["hosts"].state == "failed"
    assert f"{socket.gethostname()}: extension locks: '{lock}'" in found["hosts"].found


@pytest.mark.multiprocess
def test_as_a_job_it_tells_about_the_cluster(head: Head, tmp_path: Path) -> None:
    for name in ("distrec", "jobs"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "distrec.cli", "submit", "doctor", "--address", head.address], cwd=tmp_path, timeout=240,
        env={**head.environment, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert re.search(r"^passed +head +\S+:\d+ answers$", done.stdout, re.MULTILINE), done.stdout + done.stderr
    assert re.search(rf"^(passed|failed) +hosts +.*{socket.gethostname()}", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^\d+ failed, \d+ passed, \d+ not applicable$", done.stdout, re.MULTILINE)
    assert TOKEN not in done.stdout + done.stderr
