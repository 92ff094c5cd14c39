"""Following a job: its log as it is written, whatever happens to the connection, and then its real status."""

from __future__ import annotations

import asyncio
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from distrec.errors import DONE, FAILED, INTERRUPTED
from distrec.submission.cluster import Cluster, NoAnswer, UnknownJob

SILENCE = 5.0  # seconds without a line after which the job's status is looked at
PATIENCE = 120.0  # seconds for which the head may not answer
_GAP = 1.0  # seconds between two tries to reach the head
_UNKNOWN = 3  # answers in a row that the job is unknown, before that is believed
_LONGEST = 2000  # characters of Ray's message about a job that did not run


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


class Follower:
    """Follows one job.

    Attributes:
        shown: characters of the job's log that have been printed. The log only grows, and a new stream begins at its
            first character, so this number says where to go on.
    """

    def __init__(self, cluster: Cluster, job: str, patience: float = PATIENCE, silence: float = SILENCE):
        self._cluster, self._job = cluster, job
        self._patience, self._silence = patience, silence
        self._answered = time.monotonic()
        self._unknown, self._quiet_since = 0, False
        self.shown = 0

    def follow(self) -> int:
        """Print the log until the job ends; returns the exit status of its verb.

        On Ctrl-C, asks whether to stop the job or to leave it running; a second one leaves it. Without a terminal, and
        on SIGTERM, leaves it.
        """
        stopping = False
        with _sigterm_raises():
            while True:
                try:
                    return self._follow()
                except Terminated:
                    return self._leave(stopping)
                except KeyboardInterrupt:
                    if stopping:
                        return self._leave(stopping)
                    try:
                        stopping = self._wants_to_stop()
                        if stopping:
                            self._stop()
                    except KeyboardInterrupt:
                        return self._leave(stopping)
                    if not stopping:
                        return self._leave(stopping)

    def _follow(self) -> int:
        while True:
            whole = self._stream()
            details = self._details()
            if details is not None and details.status.is_terminal():
                if not whole:
                    self._print_rest()
                return self._status(details)
            if self._unknown >= _UNKNOWN:
                _tell(f"the cluster does not know job '{self._job}' any more: its head was started again, which ends "
                      "all jobs; run the same command again")  # fmt: skip
                return FAILED
            if time.monotonic() - self._answered > self._patience:
                _tell(f"the head at {self._cluster.address} has not answered for {self._patience:.0f} s; the job may "
                      f"still be running: {self._how()}")  # fmt: skip
                return FAILED
            time.sleep(_GAP)

    def _stream(self) -> bool:
        """Print one stream of the log up to its end; returns whether it ended by itself."""
        skip = self.shown
        with _Stream(self._cluster.client, self._job) as stream:
            while (text := stream.read(self._silence)) is not None:
                if not text:
                    details = self._details()
                    if details is None or details.status.is_terminal():
                        return False  # the connection is dead, or the end of the stream did not arrive
                    continue
                fresh = text[skip:]
                skip = max(0, skip - len(text))
                self._print(fresh)
            return stream.whole

    def _print(self, text: str) -> None:
        self.shown += len(text)  # first: an interrupted print may have written it
        sys.stdout.write(text)
        sys.stdout.flush()

    def _print_rest(self) -> None:
        try:
            self._print(self._cluster.log(self._job)[self.shown :])
        except (NoAnswer, UnknownJob) as error:
            _tell(f"the end of the log cannot be read ({error})")

    def _details(self) -> Any:
        """The job's details, or None if the head does not give them; says so once."""
        try:
            details = self._cluster.details(self._job)
        except UnknownJob:
            self._unknown += 1
            return None
        except NoAnswer as error:
            if not self._quiet_since:
                _tell(f"the head at {self._cluster.address} does not answer ({error}); trying for "
                      f"{self._patience:.0f} s")  # fmt: skip
            self._quiet_since = True
            return None
        if self._quiet_since:
            _tell("the head answers again")
        self._quiet_since, self._unknown, self._answered = False, 0, time.monotonic()
        return details

    def _status(self, details: Any) -> int:
        status, code = details.status.value, details.driver_exit_code
        if status == "SUCCEEDED":
            _tell(f"job '{self._job}' is done")
            return DONE
        if status == "STOPPED":
            _tell(f"job '{self._job}' was stopped; the same command continues")
            return INTERRUPTED
        if code:
            code = code if code > 0 else 128 - code  # the shell's status of a process that a signal ended
            _tell(f"job '{self._job}' ended with exit status {code}")
            return int(code)
        _tell(f"job '{self._job}' failed before or without its command: {(details.message or '').strip()[-_LONGEST:]}")
        return FAILED

    def _wants_to_stop(self) -> bool:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            return False
        print(f"\njob '{self._job}': stop it (s), or leave it running (l)? [l] ", end="", flush=True)
        return sys.stdin.readline().strip().lower() in ("s", "stop")

    def _stop(self) -> None:
        _tell("stopping the job; it saves a checkpoint first (Ctrl-C leaves at once)")
        try:
            self._cluster.stop(self._job)
        except (NoAnswer, UnknownJob) as error:
            _tell(f"the job could not be stopped ({error}): {self._how()}")

    def _leave(self, stopping: bool) -> int:
        _tell(f"left job '{self._job}' {'stopping' if stopping else 'running'}: {self._how()}")
        return INTERRUPTED

    def _how(self) -> str:
        return how_to(self._cluster.address, self._job)


def how_to(address: str, job: str) -> str:
    """How to follow and to stop a job, for a message."""
    return (
        f"'ray job logs --follow --address {address} {job}' shows its log, 'ray job stop --address {address} {job}' "
        "stops it"
    )


class _Stream:
    """One stream of a job's log, read in another thread."""

    def __init__(self, client: Any, job: str):
        self._client, self._job = client, job
        self._texts: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.whole = False

    def __enter__(self) -> _Stream:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._loop is not None and self._task is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(1)

    def read(self, seconds: float) -> str | None:
        """The next part of the log, "" if none comes within `seconds`, None at the end."""
        try:
            return self._texts.get(timeout=seconds)
        except queue.Empty:
            return ""

    def _run(self) -> None:
        try:
            asyncio.run(self._read())
            self.whole = True
        except (Exception, asyncio.CancelledError):  # whatever it was, the job's status says what follows
            pass
        finally:
            self._texts.put(None)

    async def _read(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        async for text in self._client.tail_job_logs(self._job):
            self._texts.put(text)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise `Terminated`, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(signum: int, frame: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(text: str) -> None:
    print(f"distrec submit: {text}", file=sys.stderr, flush=True)
