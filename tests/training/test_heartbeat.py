"""Heartbeats of workers, on the cluster that tests share."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

import psutil
import pytest

from distrec.training import heartbeat
from distrec.training.heartbeat import Beat, Heartbeat, Monitor, phase

pytestmark = pytest.mark.multiprocess


class Worker:
    """Reports to a monitor, as a Ray Train worker does, and takes two seconds without an answer for the end."""

    def begin(self, monitor: Any, rank: int, beat: float = heartbeat.BEAT) -> int:
        heartbeat.ORPHAN, heartbeat.BEAT = 2.0, beat
        phase("imports")
        self._heartbeat = Heartbeat(monitor, rank)
        self._heartbeat.__enter__()
        return os.getpid()

    def train(self) -> None:
        phase("training")
        phase("training")  # only the first counts


def read(monitor: Any, ready: Any, seconds: float = 20) -> dict[int, Beat]:
    import ray

    deadline = time.monotonic() + seconds
    while not ready(found := ray.get(monitor.read.remote())):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return dict(found)


def test_the_monitor_knows_where_each_worker_is_and_how_far(cluster: None) -> None:
    import ray

    monitor, workers = ray.remote(num_cpus=0)(Monitor).remote(), [ray.remote(num_cpus=0)(Worker).remote() for _ in "ab"]
    processes = ray.get([worker.begin.remote(monitor, rank) for rank, worker in enumerate(workers)])
    beats = read(monitor, lambda found: len(found) == 2)
    assert [beats[rank].process for rank in (0, 1)] == processes
    assert {beat.host for beat in beats.values()} == {socket.gethostname()}
    assert all(list(beat.phases) == ["imports"] for beat in beats.values())
    time.sleep(1)
    ray.get(workers[1].train.remote())
    beats = read(monitor, lambda found: "training" in found[1].phases)
    assert beats[1].phases["imports"] >= beats[1].phases["training"] + 1
    assert "training" not in beats[0].phases

    ray.kill(workers[0])  # it falls silent; the other one does not
    beats = read(monitor, lambda found: found[0].silent > 2)
    assert beats[1].silent < 2
    ray.get(monitor.kill_workers.remote())
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(workers[1].train.remote(), timeout=20)
    ray.kill(monitor)


def test_a_worker_that_lost_its_driver_ends_itself(cluster: None) -> None:
    """The monitor is beside the driver, so it is gone with it."""
    import ray

    monitor, worker = ray.remote(num_cpus=0)(Monitor).remote(), ray.remote(num_cpus=0)(Worker).remote()
    process = ray.get(worker.begin.remote(monitor, 0))
    read(monitor, lambda found: 0 in found)
    ray.kill(monitor)
    deadline = time.monotonic() + 30
    while psutil.pid_exists(process):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_the_monitor_hears_at_once_of_a_phase_that_begins(cluster: None) -> None:
    """A worker may die before its next regular report."""
    import ray

    monitor, worker = ray.remote(num_cpus=0)(Monitor).remote(), ray.remote(num_cpus=0)(Worker).remote()
    ray.get(worker.begin.remote(monitor, 0, 600.0))
    read(monitor, lambda found: 0 in found)
    ray.get(worker.train.remote())
    read(monitor, lambda found: "training" in found[0].phases)
