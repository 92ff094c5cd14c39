"""Room on a cluster: what is refused at once, and what is waited for."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from distrec.cluster import capacity
from distrec.cluster.capacity import Ask, Offer, current_offer, fitting, never, wait_for
from distrec.errors import InputError
from tests.training.hosts import Hosts


def ask(least: int, most: int | None = None, cpus: float = 1.0) -> Ask:
    return Ask(least, most or least, cpus, "key 'train.workers' is so", "lower it")


@pytest.mark.parametrize("seed", range(20))
def test_workers_fit_on_hosts_one_by_one(seed: int) -> None:
    """As many fit as a greedy placement finds; CPUs of two hosts do not add up."""
    draw = random.Random(seed)
    cpus, hosts = draw.choice([0.5, 1, 1.5, 3]), [draw.randrange(9) / 2 for _ in range(draw.randrange(5))]
    left, placed = list(hosts), 0
    for number in range(len(left)):
        while left[number] >= cpus:
            left[number], placed = left[number] - cpus, placed + 1
    assert fitting(cpus, hosts) == placed


def test_tenths_of_cpus_fit_as_often_as_they_should() -> None:
    assert fitting(0.1, [1.0]) == 10
    assert fitting(0.7, [2.1]) == 3


def test_only_what_can_never_be_is_refused() -> None:
    def reason(wanted: Ask, total: list[float], types: list[float] | None = None, fixed: bool = False) -> str | None:
        return never(wanted, Offer(free=[], total=total, types=types, fixed=fixed))

    assert reason(ask(3), []) is None  # a cluster that has no host yet
    assert reason(ask(3), [0.0]) is None  # only a head without CPUs
    assert reason(ask(3), [1.0, 1.0]) is None  # a third host may join
    assert "offers 2" in (reason(ask(3), [1.0, 1.0], fixed=True) or "")
    assert reason(ask(2, 5), [1.0, 1.0], fixed=True) is None
    assert "largest host of the cluster has 2" in (reason(ask(1, cpus=4), [0.0, 2.0]) or "")
    assert reason(ask(1, cpus=4), [2.0], types=[8.0]) is None  # an autoscaler may start such a host
    assert "has 3" in (reason(ask(1, cpus=4), [2.0], types=[3.0]) or "")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.mktemp("home")) as started:
        yield started


@pytest.mark.multiprocess
def test_a_cluster_is_waited_for_until_hosts_join(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "SETTLE", 2.0)
    assert current_offer().total == [0.0]
    with pytest.raises(InputError, match=r"after 1 s the cluster still has room for 0 of 2 \(0 hosts with 0 CPUs"):
        wait_for(ask(2), limit=1)
    lines: list[str] = []
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(wait_for, ask(1), limit=60, say=lines.append)
        time.sleep(2)
        assert not waiting.done()
        hosts.add()
        assert waiting.result(60) == 1
    (line,) = lines
    assert line.startswith("waiting for the cluster: key 'train.workers' is so, and it has room for 0 of 1 (")
    assert wait_for(ask(1, 3), limit=60) == 1  # less than wanted, but nothing changes
    hosts.add(2)
    assert wait_for(ask(1, 3), limit=60) == 3
    with pytest.raises(InputError, match="largest host of the cluster has 2"):
        wait_for(ask(1, cpus=3), limit=60)
    began = time.monotonic()
    assert wait_for(ask(9), limit=60, stop=lambda: time.monotonic() - began > 2) == 0


@pytest.mark.multiprocess
def test_a_host_that_will_be_taken_away_counts_as_gone(hosts: Hosts) -> None:
    node = hosts.add(4)
    before = sum(current_offer().total)
    hosts.drain(node, seconds=60)
    deadline = time.monotonic() + 20
    while sum(current_offer().total) != before - 4:
        assert time.monotonic() < deadline
        time.sleep(0.2)
