"""What can be seen of a run from outside while faults meet it, and what is left of it afterwards."""

from __future__ import annotations

import json
import re
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

from tests.lab.cluster import Cluster
from tests.lab.hosts import Host
from tests.training import small

TRAINER = "RayTrainWorker"  # in the title of the processes that train
_EPOCH = re.compile(r"epoch +\d+ ")
_BANNER = re.compile(r"distrec: |  (run|workers|valid|test|note) |Running entrypoint|.*Runtime env is setting up")
_SUMMARY = re.compile(r"\S+: best epoch ")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LOOK = 0.5  # seconds


class Place(Protocol):
    """Where runs are, as seen from outside the lab."""

    def keys(self, prefix: str) -> list[str]: ...

    def read(self, key: str) -> bytes | None: ...

    def fetch(self, prefix: str, folder: Path) -> Path: ...


@dataclass(frozen=True)
class Seen:
    """Something that was seen at a time, in seconds since the epoch."""

    at: float
    what: Any


class Observer(threading.Thread):
    """Looks at a run and its job every half second, in a thread, until `stop`.

    Attributes:
        lines: what the job's driver has written, line by line.
        steps: the changes of `progress.json`, as (epoch, step).
        checkpoints: the names of complete checkpoints.
        restarts: entries of the lists `restarts` in `run.json`.
        trainers: the processes that train, by their number outside the lab, with their host's name as `what` and
            `at` the time of their start.
    """

    def __init__(self, cluster: Cluster, place: Place, run: str, job: str):
        super().__init__(daemon=True)
        self.cluster, self.place, self.run_name, self.job = cluster, place, run, job
        self.lines: list[Seen] = []
        self.steps: list[Seen] = []
        self.checkpoints: list[Seen] = []
        self.restarts: list[Seen] = []
        self.trainers: dict[int, Seen] = {}
        self.trouble = ""  # the last error of a look
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(_LOOK):
            for look in (self._look_at_log, self._look_at_processes, self._look_at_run):
                try:
                    look()
                except Exception as error:
                    self.trouble = f"{look.__name__}: {error!r}"

    def stop(self) -> None:
        """Look once more, and end."""
        self._ended.set()
        self.join(60)
        with suppress(Exception):
            self._look_at_log()
            self._look_at_run()

    def _look_at_log(self) -> None:
        lines = self.cluster.job_log(self.job).splitlines()
        mine = sum(seen.what[0] == self.job for seen in self.lines)
        self.lines += [Seen(time.time(), (self.job, _COLOUR.sub("", line))) for line in lines[mine:]]

    def _look_at_processes(self) -> None:
        for host, pid, started in trainers(self.cluster):
            self.trainers.setdefault(pid, Seen(started, host.name))

    def _look_at_run(self) -> None:
        prefix = f"runs/{self.run_name}"
        progress = json.loads(self.place.read(f"{prefix}/progress.json") or b"{}")
        if progress and (not self.steps or self.steps[-1].what != (progress["epoch"], progress["step"])):
            self.steps.append(Seen(time.time(), (progress["epoch"], progress["step"])))
        known = {seen.what for seen in self.checkpoints}
        for key in self.place.keys(f"{prefix}/checkpoints/"):
            name = key.split("/")[-2]
            if key.endswith("/complete.json") and name not in known:
                self.checkpoints.append(Seen(time.time(), name))
        record = json.loads(self.place.read(f"{prefix}/run.json") or b"{}")
        found = _restarts(record)
        self.restarts += [Seen(time.time(), entry) for entry in found[len(self.restarts) :]]

    def epochs(self) -> int:
        """How many whole epochs have a checkpoint."""
        return max((int(seen.what.split("-")[1]) for seen in self.checkpoints), default=0)


def trainers(cluster: Cluster) -> list[tuple[Host, int, float]]:
    """The processes that train: host, number outside the lab, time of start."""
    found = []
    for host in cluster.lab.hosts.values():
        if host.is_on and host.name in cluster.ray:
            for process in host.processes(TRAINER):
                with suppress(psutil.Error):
                    found.append((host, process.pid, psutil.Process(process.pid).create_time()))
    return found


@dataclass
class Record:
    """What a fault did to a run. Times are in seconds after the fault; None if what they name never came.

    Attributes:
        fault: its name.
        outcome: the status of each submission, such as "SUCCEEDED".
        detected: until the job's log or `run.json` said something of it.
        started: until the last of the new processes that train was started, or None if the old ones went on.
        next_step: until the next training step was seen. Progress reaches an object store every 5 s.
        next_checkpoint: until the next checkpoint was complete.
        resubmitted: from the second submission to the next step, if the same command was given again.
        rows: expected, trained, duplicated and lost rows of all epochs.
        state: how the end differs from that of the undisturbed run.
        restarts: the entries in `run.json`.
        saw: the lines of the job's log after the fault, without those of epochs.
    """

    fault: str
    outcome: list[str] = field(default_factory=list)
    detected: float | None = None
    started: float | None = None
    next_step: float | None = None
    next_checkpoint: float | None = None
    resubmitted: float | None = None
    rows: dict[str, int] = field(default_factory=dict)
    state: str = "no end"
    restarts: list[Any] = field(default_factory=list)
    saw: list[str] = field(default_factory=list)

    def json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @property
    def whole(self) -> bool:
        """Whether every row was trained once per epoch."""
        rows = self.rows
        return bool(rows) and rows["expected"] == rows["trained"] and rows["duplicated"] == rows["lost"] == 0


def timed(record: Record, seen: Observer, at: float, old: set[int]) -> None:
    """Fill in the times of `record` after a fault at the time `at`, when the processes `old` trained."""
    lines = [entry for entry in takewhile(_before_summary, seen.lines) if entry.at > at and told(entry.what[1])]
    record.detected = _after(at, [entry.at for entry in (*lines, *seen.restarts) if entry.at > at])
    new = [entry.at for pid, entry in seen.trainers.items() if pid not in old and entry.at > at]
    # Those of one start follow each other within seconds; a second start has a time of its own in `restarts`.
    first = [start for start in new if start < min(new) + 10]
    record.started = round(max(first) - at, 1) if first else None
    record.next_step = _after(at, [entry.at for entry in seen.steps if entry.at > (max(first) if first else at)])
    since = max(first) if first else at
    record.next_checkpoint = _after(at, [entry.at for entry in seen.checkpoints if entry.at > since])
    record.saw = [entry.what[1] for entry in lines]


def first_step(seen: Observer, at: float) -> float | None:
    """Seconds from the time `at` to the first step of processes that started later; others may train on as orphans."""
    began = [entry.at for entry in seen.trainers.values() if entry.at > at]
    return _after(at, [entry.at for entry in seen.steps if began and entry.at > min(began)])


def told(line: str) -> bool:
    """Whether a line of a job's log is more than the record of an epoch or the description of the run."""
    return bool(line.strip()) and not _EPOCH.match(line) and not _BANNER.match(line)


def _before_summary(entry: Seen) -> bool:
    return _SUMMARY.match(entry.what[1]) is None


def _after(at: float, times: list[float]) -> float | None:
    return round(min(times) - at, 1) if times else None


def restarts(run: Path) -> list[dict[str, Any]]:
    """The restarts of all attempts in `run.json`."""
    return _restarts(small.read(run, "run.json")) if (run / "run.json").exists() else []


def _restarts(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for attempt in record.get("attempts", []) for entry in attempt.get("restarts", [])]


def rows(run: Path) -> dict[str, int]:
    """The ledgers of all epochs, added up."""
    total = dict.fromkeys(("expected", "trained", "duplicated", "lost"), 0)
    for epoch in small.metrics(run):
        for name in total:
            total[name] += epoch["ledger"][name]
    return total


def difference(want: Path, got: Path, lr: float, steps: int) -> str:
    """How the end of a run differs from that of another one of the same config: "bit-equal", "equal", or what differs.

    "equal" is within the tolerance of promise 1.
    """
    if not (got / "summary.json").exists():
        return "not finished"
    mine, others = small.tensors(got), small.tensors(want)
    exact = mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)
    exact = exact and small.read(got, "summary.json")["valid"] == small.read(want, "summary.json")["valid"]
    if exact:
        return "bit-equal"
    try:
        small.same_losses(want, got, rtol=1e-5)
        small.same_tensors(others, mine, lr, steps)
    except AssertionError as error:
        return f"differs: {str(error).strip().splitlines()[0] if str(error).strip() else 'ledger or epochs'}"
    return "equal"
