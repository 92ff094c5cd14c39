"""One lab for all tests of several hosts, with the demo shop prepared on its S3 storage."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.cluster import Cluster
from tests.lab.faults import Undisturbed
from tests.lab.hosts import Lab, lack
from tests.lab.site import encode, start


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and three workers, the raw demo shop prepared as `DATA`, and a client with a copy of the repository."""
    if missing := lack():
        pytest.skip(missing)
    with Lab(tmp_path_factory.mktemp("lab") / "lab") as lab:
        yield start(lab)


@pytest.fixture(scope="session")
def encoded(site: Cluster) -> str:
    """The output of `distrec encode` on three hosts, which the other tests need."""
    return encode(site)


@pytest.fixture(scope="session")
def undisturbed(site: Cluster, encoded: str, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Runs in one process."""
    return Undisturbed(site, tmp_path_factory.mktemp("undisturbed"))
