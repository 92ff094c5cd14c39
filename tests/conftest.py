"""Fixtures for all rooms: real datasets beside the repository, a shared Ray cluster, and an S3 server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import SharedCluster
from tests.faulty_s3 import FaultyS3, running

# For the whole process: Ray reads the authentication mode only once, so a later cluster with another mode would never
# start an actor.
os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
SHARED_CLUSTER = SharedCluster()
CLUSTER_FILES = (
    "tests/tuning/test_kills.py", "tests/tuning/test_tune.py", "tests/training/test_on_ray.py",
    "tests/training/test_heartbeat.py", "tests/cluster/test_ray_internals.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that two processes end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("multiprocess")}
    items.sort(key=lambda item: 0 if _file(item.nodeid) in CLUSTER_FILES else 1 if item.path in slow else 2)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give whole files to a process, and all files on the shared cluster to one process, which starts it once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "cluster" if _file(nodeid) in CLUSTER_FILES else _file(nodeid)

    return ByFile(config, log)


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the shared cluster after the last of its tests, so that no other test finds it."""
    if _on_cluster(item) and not (nextitem and _on_cluster(nextitem)):
        SHARED_CLUSTER.stop()


def _on_cluster(item: pytest.Item) -> bool:
    return "shared_cluster" in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedCluster]:
    """The Ray cluster that tests share, for fixtures that run something on it."""
    SHARED_CLUSTER.home = tmp_path_factory.mktemp("home")
    yield SHARED_CLUSTER
    SHARED_CLUSTER.stop()


@pytest.fixture
def cluster(shared_cluster: SharedCluster) -> None:
    """A Ray cluster of 2 CPUs, which commands in this process use and do not stop.

    Its tests may kill Train workers and trials, which Ray restarts, but no process of the cluster itself.
    """
    shared_cluster.start()


@pytest.fixture
def shared_data() -> Path:
    """The folder of real datasets; without it, the test is skipped."""
    if not SHARED.is_dir():
        pytest.skip("shared/data is not beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def _s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a moto server process, an S3 imitation that keeps buckets in memory and accepts any credentials."""
    pytest.importorskip("moto")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with open(tmp_path_factory.mktemp("s3") / "log", "wb") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(url, timeout=1)
                break
            except OSError:
                assert process.poll() is None, "the S3 server ended while starting"
                time.sleep(0.1)
        else:
            pytest.fail("the S3 server did not answer within 30 s")
        yield url
    finally:
        process.kill()
        process.wait(10)


@pytest.fixture
def s3(_s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a new, empty bucket. Environment variables give clients access to it, also in child processes."""
    from distrec.data.s3 import S3

    monkeypatch.setenv("AWS_ENDPOINT_URL", _s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    S3.clear_instance_cache()
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    S3().mkdir(bucket)
    yield f"s3://{bucket}"
    S3.clear_instance_cache()


@pytest.fixture(scope="session")
def _faulty_s3(_s3_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyS3]:
    with running(_s3_server.removeprefix("http://"), tmp_path_factory.mktemp("faulty_s3") / "log") as proxy:
        yield proxy


@pytest.fixture
def faulty_s3(_faulty_s3: FaultyS3, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A healthy proxy before the S3 server, with a new bucket; clients go through it until the test ends."""
    from distrec.data.s3 import S3

    monkeypatch.setenv("AWS_ENDPOINT_URL", _faulty_s3.url)
    S3.clear_instance_cache()
    _faulty_s3.heal()
    _faulty_s3.bucket = s3
    yield _faulty_s3
    _faulty_s3.heal()
