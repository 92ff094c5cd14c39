"""Heartbeats of Ray Train workers: who is alive, how far each has come, and whether the driver still is.

The driver starts one `Monitor`, a Ray actor beside it. Every worker reports to it from a thread of its own, twice per
second and when it begins a phase of its start. A worker that is silent for long is frozen, or its host cannot be
reached; the driver then ends all workers, and they start again. A worker that cannot reach the monitor has lost its
driver, so nobody waits for its work: it ends itself, before another attempt at the run can begin elsewhere.

Ray Train itself notices a frozen worker after ten minutes, and workers of a lost driver after a minute or never.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any, NamedTuple

NAMESPACE = "distrec"  # of Ray, in which monitors have names
BEAT = 0.5  # seconds between two heartbeats
ORPHAN = 20.0  # seconds without an answer after which a worker has lost its driver; a short cut of a link is survived

_PHASES: dict[str, float] = {}  # when this process began each phase of its start
_NEWS = threading.Event()  # a phase has begun since the last report


class Beat(NamedTuple):
    """What the monitor knows of a worker.

    Attributes:
        host: name of its host.
        node: Ray's id of its host.
        process: number of its process there.
        silent: seconds since its last heartbeat.
        phases: seconds since it began each phase of its start, by name and in order.
    """

    host: str
    node: str
    process: int
    silent: float
    phases: dict[str, float]


class Monitor:
    """Collects heartbeats; a Ray actor. Its times are those of its own clock."""

    def __init__(self) -> None:
        self._known: dict[int, dict[str, Any]] = {}
        self._heard: dict[int, float] = {}

    def beat(self, rank: int, facts: dict[str, Any]) -> None:
        """Take a heartbeat of the worker of `rank`."""
        self._known[rank], self._heard[rank] = facts, time.monotonic()

    def read(self) -> dict[int, Beat]:
        """What is known of each worker, by rank."""
        now = time.monotonic()
        found = {}
        for rank, facts in self._known.items():
            silent = now - self._heard[rank]
            phases = {name: ago + silent for name, ago in facts["phases"].items()}
            found[rank] = Beat(facts["host"], facts["node"], facts["process"], silent, phases)
        return found

    def kill_workers(self) -> None:
        """End the process of every worker at once."""
        import ray

        for facts in self._known.values():
            with suppress(Exception):  # it is gone already
                ray.kill(facts["actor"])


class Heartbeat:
    """Reports this worker to the monitor from a thread until the block ends, and ends the process of an orphan.

    Args:
        monitor: handle of the monitor.
        rank: this worker's rank.
    """

    def __init__(self, monitor: Any, rank: int):
        self._monitor, self._rank = monitor, rank
        self._done, self._known = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._report, daemon=True)

    def __enter__(self) -> Heartbeat:
        import ray

        context = ray.get_runtime_context()
        self._facts = {
            "host": socket.gethostname(), "node": context.get_node_id(), "process": os.getpid(),
            "actor": context.current_actor,
        }  # fmt: skip
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        _NEWS.set()

    def wait_until_known(self) -> None:
        """Return once the monitor knows this worker: if it dies later, the driver can say which process it was."""
        self._known.wait()  # at most `ORPHAN` seconds: a worker without an answer ends

    def _report(self) -> None:
        import ray

        answered = time.monotonic()
        while not self._done.is_set():
            _NEWS.clear()
            with suppress(Exception):  # whatever Ray raises while the driver's host cannot be reached
                now = time.monotonic()
                phases = {name: now - began for name, began in _PHASES.items()}
                ray.get(self._monitor.beat.remote(self._rank, {**self._facts, "phases": phases}), timeout=5)
                answered = time.monotonic()
                self._known.set()
            if time.monotonic() - answered > ORPHAN and not self._done.is_set():
                print(f"worker {self._rank} has lost its driver and ends", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)  # an ordinary exit would wait for the other threads
            _NEWS.wait(BEAT)


def phase(name: str) -> None:
    """Note that this process begins a phase of its start, unless it has begun it before."""
    if name not in _PHASES:
        _PHASES[name] = time.monotonic()
        _NEWS.set()
