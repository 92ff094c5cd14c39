"""`distrec drill RUN`: do to a run's workers what happens on clusters, and measure how the run goes on.

It kills or freezes one worker, as the run must survive by its own means, and watches from outside: the run's record,
its metrics, and the monitor of its workers. Every fault follows a finished epoch, so that a checkpoint is there and the
count of failures begins anew. All times are those of this process's clock.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from distrec.cluster.connection import ray_cluster
from distrec.cluster.processes import Unreachable, signal_worker
from distrec.config.paths import PATH_WIDTH, located
from distrec.config.run import RunConfig
from distrec.errors import DONE, FAILED, InputError, WorkersFailed, shown
from distrec.training.group import start_seconds, who
from distrec.training.heartbeat import NAMESPACE, Beat
from distrec.training.journal import monitor_name
from distrec.training.run_folder import RunFolder, place_in_words

SIGNALS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}
LIMIT = 300.0  # seconds, besides those of two epochs, in which a run must have recovered from a fault
_SPARE = 2  # epochs that a run must have left besides one per fault: the first is waited for, the last may end the run
_ANSWER = 10.0  # seconds that a monitor may take to answer
_LOOK = (0.2, 1.0)  # seconds between looks at a local folder, and at an object store

T = TypeVar("T")


@dataclass(frozen=True)
class Recovery:
    """How a run went on after a fault.

    Attributes:
        fault: a key of `SIGNALS`.
        cause: what the run said about it.
        noticed: seconds from the fault until the run had ended the group of workers that it hit.
        waited: seconds for which the run then waited for room on the cluster.
        start: seconds of each phase of the next start; all of these together last until the next step was trained.
        lost: rows that the epochs since then have not trained on.
        doubled: rows that they have trained on more than once.
    """

    fault: str
    cause: str
    noticed: float
    waited: float
    start: Mapping[str, float]
    lost: int
    doubled: int


class NotRecovered(WorkersFailed):
    """The run did not do in time what was waited for, or ended."""


def drill(path: str, faults: Sequence[str] = tuple(SIGNALS)) -> int:
    """Do faults to the workers of a run that is being trained, one after the other, and print a table.

    Args:
        path: the run's folder, `<run.storage>/<run.name>`.
        faults: keys of `SIGNALS`.

    Returns:
        The exit status: 0 if every fault was survived and no row was lost or doubled, else 1.

    Raises:
        InputError: there is no such run, nobody trains it here, or it might not survive the faults.
        NotRecovered: the run did not go on in time after a fault, or ended; the table of the faults before is printed.
    """
    run, config = RunFolder.existing(located(path, "run"))
    if (reason := refusal(config, len(run.read_metrics()), len(faults))) is not None:
        raise InputError(f"run {shown(path, PATH_WIDTH)} {reason}")
    with ExitStack() as stack:
        try:
            stack.enter_context(ray_cluster(other="auto"))
        except ConnectionError:
            raise InputError(
                f"no Ray cluster can be reached{_at()}; set RAY_ADDRESS to the address of the cluster that trains the "
                "run, or use 'distrec submit drill'."
            ) from None
        return _Drill(run, config).run(faults)


def refusal(config: RunConfig, epochs: int, faults: int) -> str | None:
    """Why a run would not survive the faults, or could not show that it does; None if nothing speaks against them.

    Args:
        config: the run's config.
        epochs: the number of finished epochs.
        faults: the number of faults.
    """
    train, needed = config.train, faults + _SPARE
    if train.most_workers == 0:
        return (
            "trains without workers (key 'train.workers' is 0), so a fault would end it; train it on a Ray cluster, "
            "with 'train.workers' of at least 1."
        )
    if train.max_failures == 0:
        return (
            "would end with the first fault, because key 'train.max_failures' is 0; stop it, and train on with a "
            "larger number."
        )
    if epochs == 0:
        return "has not finished an epoch, so it would begin anew after a fault; wait for its first epoch."
    if train.epochs - epochs < needed:
        return (
            f"is about to end: {max(train.epochs - epochs, 0)} of 'train.epochs' {train.epochs} are left, and "
            f"{faults} {'fault needs' if faults == 1 else 'faults need'} {needed}; drill a longer run."
        )
    return None


def table(recoveries: Sequence[Recovery]) -> str:
    """What is printed at the end: a line of numbers for each fault, and below it what the run said."""
    phases = list(dict.fromkeys(name for recovery in recoveries for name in recovery.start))
    head = ["fault", "noticed", "waited", *phases, "next step", "rows lost", "rows doubled"]
    rows = []
    for recovery in recoveries:
        seconds = [recovery.noticed, recovery.waited, *(recovery.start.get(name, 0.0) for name in phases)]
        numbers = [*(f"{value:.1f}" for value in (*seconds, sum(seconds))), f"{recovery.lost:,}"]
        rows.append([recovery.fault, *numbers, f"{recovery.doubled:,}"])
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["seconds of each part, from the fault to the next step; rows of the epochs that finished since then"]
    for number, row in enumerate([head, *rows]):
        cells = [word.rjust(width) for word, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(["", row[0].ljust(widths[0]), *cells]))
        if number:
            lines.append(f"    {recoveries[number - 1].cause}")
    return "\n".join(lines)


class _Drill:
    """The faults of one command, and what is seen of the run meanwhile."""

    def __init__(self, run: RunFolder, config: RunConfig):
        self._run = run
        self._prefix = f"{monitor_name(RunFolder.of(config))}-"  # by the path that the run itself uses
        self._record, self._history = run.record, run.read_metrics()
        self._attempt = len(self._record["attempts"]) - 1
        self._look = _LOOK[not run.folder.local]

    def run(self, faults: Sequence[str]) -> int:
        if not any(map(_beats, self._monitors())):
            raise InputError(
                f"nobody trains run '{self._run.folder}' with workers on the Ray cluster{_at()}; start it there with "
                "'distrec train', or set RAY_ADDRESS to the address of the cluster that trains it."
            )
        recoveries: list[Recovery] = []
        try:
            _say("waiting for the end of an epoch")
            self._epochs_after(len(self._epochs()), self._deadline())
            for fault in faults:
                recoveries.append(self._do(fault))
        finally:
            if recoveries:
                print(table(recoveries), flush=True)
        return FAILED if any(recovery.lost or recovery.doubled for recovery in recoveries) else DONE

    def _do(self, fault: str) -> Recovery:
        deadline = self._deadline()
        beats = self._until("have all workers at work", self._training, deadline)
        known, before, restarts = set(self._monitors()), len(self._epochs()), len(self._restarts())
        rank = max(beats)
        worker = who(rank, beats)
        _say(f"{fault}: {SIGNALS[fault].name} to {worker}")
        try:
            signal_worker(beats[rank].node, beats[rank].process, SIGNALS[fault])
            struck = time.monotonic()
            restart = self._until("notice it", lambda: next(iter(self._restarts()[restarts:]), None), deadline)
        except Unreachable as error:
            raise NotRecovered(f"{worker} {error}, so nothing was done to it; try again.") from None
        except KeyboardInterrupt:
            if fault != "freeze":
                raise
            raise KeyboardInterrupt(f"interrupted; {worker} may be frozen until the run replaces it") from None
        began, epochs = time.monotonic(), len(self._epochs())
        _say(f"  {restart['cause']}")
        beats = self._until("train on", lambda: self._training(known), deadline)
        start = start_seconds(beats, time.monotonic() - began)
        _say("  it trains on; waiting for the end of the epoch")
        ledgers = [record["ledger"] for record in self._epochs_after(epochs, deadline)[before:]]
        return Recovery(
            fault,
            restart["cause"],
            noticed=max(began - struck - restart["waited"], 0.0),
            waited=restart["waited"],
            start=start,
            lost=sum(ledger["lost"] for ledger in ledgers),
            doubled=sum(ledger["duplicated"] for ledger in ledgers),
        )

    def _deadline(self) -> float:
        seconds = sum(sum(record["seconds"].values()) for record in self._epochs()[-1:])
        return time.monotonic() + LIMIT + 2 * float(seconds)

    def _until(self, what: str, look: Callable[[], T | None], deadline: float) -> T:
        """Look until something is seen, and return it.

        Args:
            what: what the run must do for that, for the message.

        Raises:
            NotRecovered: the run ended, or it is too late.
        """
        while (found := look()) is None:
            attempt = self._now()
            if (outcome := attempt.get("outcome")) is not None:
                told = f": {attempt['message']}" if "message" in attempt else ""
                raise NotRecovered(f"run '{self._run.folder}' ended before the drill did ({outcome}{told}).")
            if time.monotonic() > deadline:
                raise NotRecovered(f"run '{self._run.folder}' did not {what} in time; last seen {self._last_seen()}.")
            time.sleep(self._look)
        return found

    def _last_seen(self) -> str:
        progress, restarts = self._run.read_progress(), self._restarts()
        place = "before its first step"
        if progress:
            place = place_in_words(progress["epoch"] - 1, progress["epochs"], progress["step"], progress["steps"])
        return f"{place}, and the last that it said is: {restarts[-1]['cause']}" if restarts else place

    def _now(self) -> dict[str, Any]:
        """What the run's record says of the attempt that is drilled, as far as it could be read."""
        with suppress(OSError, InputError):  # it is just being written, or the storage does not answer
            self._record = self._run.record
        attempt: dict[str, Any] = self._record["attempts"][self._attempt]
        return attempt

    def _restarts(self) -> list[dict[str, Any]]:
        restarts: list[dict[str, Any]] = self._now().get("restarts", [])
        return restarts

    def _epochs(self) -> list[dict[str, Any]]:
        """The records of the finished epochs, as far as they could be read."""
        self._history = max(self._run.read_metrics(), self._history, key=len)
        return self._history

    def _epochs_after(self, count: int, deadline: float) -> list[dict[str, Any]]:
        """The same, once there are more than `count`."""
        return self._until("finish an epoch", lambda: found if len(found := self._epochs()) > count else None, deadline)

    def _monitors(self) -> list[str]:
        """The names of the monitors of the run's workers: of those at work, and perhaps of those that are ending."""
        import ray

        actors: Any = ray.util.list_named_actors(all_namespaces=True)
        return [
            actor["name"]
            for actor in actors
            if actor["namespace"] == NAMESPACE and actor["name"].startswith(self._prefix)
        ]

    def _training(self, besides: Set[str] = frozenset()) -> dict[int, Beat] | None:
        """What is known of the run's workers, by rank, if all of them train.

        Args:
            besides: names of monitors of earlier workers.
        """
        self._now()
        for name in self._monitors():
            if name not in besides:
                beats = _beats(name)
                training = all("training" in beat.phases for beat in beats.values())
                if training and len(beats) == self._record.get("world_size"):
                    return beats
        return None


def _beats(name: str) -> dict[int, Beat]:
    """What a monitor knows of each worker; empty if it does not answer."""
    import ray

    with suppress(ValueError, ray.exceptions.RayError):  # Ray's ValueError: it is gone
        beats: dict[int, Beat] = ray.get(ray.get_actor(name, namespace=NAMESPACE).read.remote(), timeout=_ANSWER)
        return beats
    return {}


def _say(line: str) -> None:
    print(line, flush=True)


def _at() -> str:
    address = os.environ.get("RAY_ADDRESS")
    return f" of RAY_ADDRESS {shown(address)}" if address else ""
