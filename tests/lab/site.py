"""A cluster with storage on the hosts of a lab, and the demo shop prepared on it."""

from __future__ import annotations

from tests.lab.cluster import Cluster, Storage, prepare_client
from tests.lab.hosts import REPOSITORY, Lab

DATA, RUNS = "s3://lab/data", "s3://lab/runs"


def start(lab: Lab) -> Cluster:
    """Start storage, a head and three workers on new hosts, and prepare the demo shop as `DATA`."""
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


def encode(cluster: Cluster) -> str:
    """Encode texts and images on three hosts; returns the output."""
    return cluster.done("encode", cluster.distrec_submit("encode", "encode", DATA, "--workers", "3"), 240)
