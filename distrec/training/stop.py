"""Asking a run to stop: the driver leaves a note in the run folder, workers look for it now and then.

A note works over any storage and any cluster. Rank 0 looks; the engine's per-step reduction tells the others, so that all
ranks stop after the same step.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from distrec.parallel.world import World
from distrec.training.run_folder import STOP_REQUEST, RunFolder


class StopWatch:
    """Looks for the stop request in the background while the run trains."""

    def __init__(self, run: RunFolder, world: World):
        self._run, self._rank = run, world.rank
        self._seconds = 0.25 if run.folder.local else 5.0
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
        while not self._done.wait(self._seconds):
            if self._run.folder.exists(STOP_REQUEST):
                self.requested = True
                return


@contextmanager
def on_stop_signal(ask: Callable[[], None]) -> Iterator[None]:
    """On Ctrl-C or SIGTERM call `ask`, which asks whoever trains to save and stop; a second Ctrl-C ends this process at once.

    Outside the main thread, as in a trial of a sweep, signals are somebody else's.
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
        print("\nstopping: saving a checkpoint first (Ctrl-C again to stop without)", flush=True)
        ask()

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
