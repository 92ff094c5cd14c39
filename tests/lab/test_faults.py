"""Some of the faults in `tests.lab.faults`, once each. `benchmarks/faults.py` measures all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.cluster import Cluster
from tests.lab.faults import BY_NAME, Undisturbed, meet

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


@pytest.mark.parametrize("name", ["worker-killed", "host-off", "stop", "head-off"])
def test_a_run_that_meets_a_fault_ends_like_one_that_does_not(
    site: Cluster, undisturbed: Undisturbed, tmp_path: Path, name: str
) -> None:
    fault = BY_NAME[name]
    if missing := fault.lacks(site):
        pytest.skip(missing)
    record = meet(site, fault, undisturbed, tmp_path / name, name, limit=240)
    print(record.json())
    assert record.outcome[-1] == "SUCCEEDED"
    assert record.whole
    assert record.state in ("bit-equal", "equal")
    assert record.saw, "the log says nothing of it"
