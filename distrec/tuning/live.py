"""The display of a running sweep: a table on a terminal, otherwise one line for each trial that has ended."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from rich.console import Console, Group
from rich.live import Live as RichLive
from rich.table import Table
from rich.text import Text

from distrec.errors import StorageError
from distrec.tuning.folder import Phase, SweepFolder, Trial, in_place
from distrec.tuning.sweep import SweepConfig

_SECONDS = 1.0
_ROWS = 12  # ended trials shown in the table


class Live:
    """Shows the trials of a sweep until the `with` block ends; reads only the sweep folder."""

    def __init__(self, sweep: SweepConfig, folder: SweepFolder):
        self._sweep, self._folder = sweep, folder
        self._console = Console(file=sys.stdout)
        self._phase: Phase = "trials"
        self._total, self._printed = math.inf, set[str]()
        self._started, self._before = time.monotonic(), 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._live: RichLive | None = None

    def __enter__(self) -> Live:
        print(
            f"sweep {self._folder.folder}: {len(self._sweep.methods)} methods, "
            f"compared by {self._sweep.metric} on validation",
            flush=True,
        )
        self._thread.start()
        if self._console.is_terminal:
            self._live = RichLive(console=self._console, auto_refresh=False, transient=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._show()
        if self._live is not None:
            self._live.stop()

    def phase(self, phase: Phase, total: float, trials: Sequence[Trial]) -> None:
        """Start to show a phase of at most `total` trials. `trials` are those that exist already."""
        self._show()
        ended = {trial.id for trial in in_place(trials) if trial.ended}
        self._phase, self._total, self._printed, self._before = phase, total, ended, len(ended)
        self._started = time.monotonic()
        what = "search" if phase == "trials" else "winners with fresh seeds, evaluated on test"
        count = f": at most {total:g} trials" if math.isfinite(total) else ""
        print(f"{what}{count}{f', {len(ended)} trials already ended' if ended else ''}", flush=True)

    def _watch(self) -> None:
        while not self._done.wait(_SECONDS if self._folder.folder.local else 5 * _SECONDS):
            with suppress(StorageError):  # the storage may answer at the next look
                self._show()

    def _show(self) -> None:
        trials = self._folder.trials(self._phase)
        if self._live is not None:
            self._live.update(Group(self._table(trials), Text(self._summary(trials))), refresh=True)
            return
        for trial in trials:
            if trial.ended and trial.id not in self._printed:
                self._printed.add(trial.id)
                print(f"{_line(trial, self._sweep.metric)}  | {self._summary(trials)}", flush=True)

    def _table(self, trials: Sequence[Trial]) -> Table:
        table = Table(title=f"{self._sweep.run.name}: {self._phase}")
        for name in ("trial", "method", "progress", self._sweep.metric, "minutes", "settings"):
            table.add_column(name, justify="left" if name in ("trial", "method", "settings") else "right")
        for trial in sorted((t for t in trials if not t.ended), key=lambda trial: trial.status):
            table.add_row(*self._row(trial), style="bold" if trial.status == "running" else "dim")
        ended = sorted((t for t in in_place(trials) if t.ended), key=lambda trial: -(trial.value or 0.0))
        for trial in ended[:_ROWS]:
            table.add_row(*self._row(trial))
        if len(ended) > _ROWS:
            table.add_row(f"and {len(ended) - _ROWS} more", *[""] * 5)
        return table

    def _row(self, trial: Trial) -> list[str]:
        value = "-" if trial.value is None else f"{trial.value:.4f}"
        settings = ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in trial.values.items()) or "as shipped"
        return [trial.id, trial.entry, self._progress(trial), value, f"{trial.seconds / 60:.1f}", settings]

    def _progress(self, trial: Trial) -> str:
        if trial.between_stretches:
            return f"paused at {trial.paused}"
        if trial.status != "running":
            return trial.status
        progress = self._folder.run(self._phase, trial).read_progress()
        return f"epoch {progress['epoch']}/{progress['epochs']}" if progress else "starting"

    def _summary(self, trials: Sequence[Trial]) -> str:
        """How many trials have ended, the best so far, and the minutes left at this pace."""
        ended = [trial for trial in in_place(trials) if trial.ended]
        finished = [trial for trial in trials if trial.finished]
        parts = [f"{len(ended)}{f' of {self._total:g}' if math.isfinite(self._total) else ''} ended"]
        if finished:
            best = max(finished, key=lambda trial: trial.value or 0.0)
            parts.append(f"best so far {best.value:.4f} ({best.id})")
        new, left = len(ended) - self._before, math.inf
        if new:
            left = (time.monotonic() - self._started) / new * (self._total - len(ended))
        if self._phase == "trials" and self._sweep.budget.hours is not None and self._sweep.scheduler != "pbt":
            left = min(left, max(self._sweep.budget.hours * 3600 - self._folder.record["seconds"], 0.0))
        if math.isfinite(left):
            parts.append(f"about {left / 60:.0f} minutes left")
        return ", ".join(parts)


def _line(trial: Trial, metric: str) -> str:
    value = "" if trial.value is None else f"  valid {metric} {trial.value:.4f}"
    reason = f": {trial.reason}" if trial.reason else ""
    status = "replaced" if trial.replaced else trial.status
    return f"{trial.id:<20} {status}{value}  {trial.seconds / 60:.1f} minutes{reason}"
