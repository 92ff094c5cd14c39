"""One lab for all tests of several hosts, with the demo shop prepared on its S3 storage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.cluster import Cluster, Storage, prepare_client
from tests.lab.hosts import REPOSITORY, Lab, lack

DATA, RUNS = "s3://lab/data", "s3://lab/runs"
# What the tests of single runs train, at any number of workers.
TRAIN = (
    "configs/alignrec/demo.yaml",
    f"data={DATA}",
    f"run.storage={RUNS}",
    "train.epochs=8",
    "train.checkpoint_every=4",
)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and three workers, the raw demo shop prepared as `DATA`, and a client with a copy of the repository."""
    if missing := lack():
        pytest.skip(missing)
    with Lab(tmp_path_factory.mktemp("lab") / "lab") as lab:
        yield start(lab)


def start(lab: Lab) -> Cluster:
    """Start storage and cluster on new hosts, and prepare the data."""
    prepare_client(lab["client"])
    storage = Storage(lab["storage"])
    storage.start()
    cluster = Cluster(lab, storage)
    cluster.start()
    distrec(cluster, "demo-data", "--out", "/tmp/shop")
    distrec(cluster, "prepare", str(REPOSITORY / "configs/data/demo.yaml"), "--source", "/tmp/shop", "--out", DATA)
    return cluster


def distrec(cluster: Cluster, *arguments: str, timeout: float = 300) -> str:
    """Run a verb on the storage host, in one process, with access to the storage."""
    command = ["python", "-m", "distrec.cli", *arguments]
    environment = cluster.storage.environment
    return cluster.lab["storage"].run(command, timeout, cwd=str(REPOSITORY), environment=environment)


@pytest.fixture(scope="session")
def encoded(site: Cluster) -> str:
    """The output of `distrec encode` on three hosts, which the other tests need."""
    job = site.submit("encode", "python", "jobs/encode.py", DATA, "--workers", "3")
    return site.done("encode", job, 240)


@pytest.fixture(scope="session")
def alone(site: Cluster, encoded: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `TRAIN` in one process."""
    distrec(site, "train", *TRAIN, "run.name=alone", "train.workers=0")
    return site.storage.fetch("runs/alone", tmp_path_factory.mktemp("alone"))
