"""A Ray head of its own, with dashboard and job server, in processes that end with the block."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

RAY = str(Path(sys.executable).parent / "ray")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@dataclass(frozen=True)
class Head:
    """A running head.

    Attributes:
        address: URL of its dashboard.
        environment: that of commands which use it.
        sessions: folder of Ray's sessions, with all of its logs.
        process: what keeps it alive.
        cluster: the address by which processes connect to the cluster, as in RAY_ADDRESS.
        metrics: URL of the metrics of its processes, for Prometheus.
    """

    address: str
    environment: dict[str, str]
    sessions: Path
    process: subprocess.Popen[bytes]
    cluster: str
    metrics: str

    def get(self, path: str) -> Any:
        """What the dashboard answers."""
        request = urllib.request.Request(self.address + path)
        if token := self.environment.get("RAY_AUTH_TOKEN"):
            request.add_header("Authorization", f"Bearer {token}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)


@contextmanager
def ray_head(folder: Path, cpus: int, environment: Mapping[str, str]) -> Iterator[Head]:
    """A head on its own ports whose dashboard answers; the agent that starts jobs may register later.

    Args:
        folder: its home folder, and that of its sessions.
        cpus: CPUs that it offers.
        environment: its environment besides the folder's.
    """
    port, dashboard, client, agent, metrics = free_ports(5)
    own = {**environment, "HOME": str(folder), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        own.pop(name, None)
    sessions = Path(tempfile.mkdtemp(prefix="ray-"))  # not below `folder`: paths of sockets must be short
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [RAY, "start", "--head", "--block", f"--num-cpus={cpus}", "--node-ip-address=127.0.0.1", f"--port={port}",
             "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
             f"--dashboard-agent-listen-port={agent}",  # another cluster on this host may use the default
             f"--metrics-export-port={metrics}", f"--temp-dir={sessions}",
             "--object-store-memory=100000000", "--disable-usage-stats"],
            env=own, stdout=log, stderr=log, cwd=folder, start_new_session=True,
        )  # fmt: skip
    try:
        head = Head(
            f"http://127.0.0.1:{dashboard}", own, sessions, process,
            f"127.0.0.1:{port}", f"http://127.0.0.1:{metrics}/metrics",
        )  # fmt: skip
        _wait(head, folder / "log")
        yield head
    finally:
        end(process)
        shutil.rmtree(sessions, ignore_errors=True)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.terminate()
    for child in psutil.wait_procs(children, timeout=5)[1]:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.kill()
    process.wait(10)


def _wait(head: Head, log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert head.process.poll() is None, log.read_text()
        with suppress(OSError):
            head.get("/api/version")
            return
        time.sleep(0.2)
    pytest.fail(f"the head did not answer in time:\n{log.read_text()}")
