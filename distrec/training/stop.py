"""Stopping a run: the driver writes a file `stop-request` to the run folder, and the workers poll for it.

A file works with any storage and any cluster. Only rank 0 polls. The engine's all-reduce in every step passes the
request on, so all ranks stop after the same step.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from distrec.errors import InputError
from distrec.parallel.world import World
from distrec.training.run_folder import STOP_REQUEST, RunFolder

_LOOK = 0.25  # seconds between looks: "ray job stop" kills the driver after three seconds


class StopWatch:
    """Polls for the stop request in a background thread of rank 0 while the run trains."""

    def __init__(self, run: RunFolder, world: World):
        self._run, self._rank = run, world.rank
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.requested = False

    def __enter__(self) -> StopWatch:
        if self._rank == 0:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(_LOOK):
            with suppress(OSError, InputError):  # the storage did not answer; it may at the next look
                self.requested = self._run.folder.exists(STOP_REQUEST)
            if self.requested:
                return


@contextmanager
def on_stop_signal(ask: Callable[[], None]) -> Iterator[None]:
    """On Ctrl-C or SIGTERM call `ask`, which asks the workers to save a checkpoint and stop.

    A second Ctrl-C ends this process at once. Does nothing outside the main thread, as in a trial of a sweep, because
    only the main thread can handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def handle(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        print("\nstopping: saving a checkpoint first (press Ctrl-C again to stop without one)", flush=True)
        ask()

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
