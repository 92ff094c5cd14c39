"""What the driver tells about workers that start, end and start again: to the user, and in `run.json`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from distrec.config.run import RunConfig, digest
from distrec.training.display import Display
from distrec.training.policy import Reason
from distrec.training.prometheus import Prometheus, connected
from distrec.training.run_folder import RunFolder


def monitor_name(run: RunFolder) -> str:
    """What the names of the monitors of a run's workers begin with."""
    return f"monitor-{digest(str(run.folder))[:16]}"


class Journal:
    """What a supervisor tells about its work, and what it asks about it. This one only prints."""

    def name(self) -> str | None:
        """A name for the workers' monitor, by which `distrec drill` finds it; None: nobody looks for it."""
        return None

    def say(self, line: str) -> None:
        """Show a line to the user."""
        print(line, flush=True)

    def progress(self) -> int:
        """A number that grows with every finished epoch."""
        return 0

    def restarting(self, cause: str, workers: int, seconds: float) -> None:
        """Workers are about to start again, `seconds` after the last ones ended."""

    def started(self, seconds: Mapping[str, float]) -> None:
        """The workers of a group have begun their work; the seconds that each phase of their start took."""

    def ended(self) -> None:
        """No worker is at work any more, and none will start."""

    def request_stop(self, reason: Reason) -> None:
        """Ask the workers to save a checkpoint and end."""

    def clear_request(self) -> None:
        """Take back what `request_stop` asked for, unless the user has asked for it too."""

    def stopping(self) -> bool:
        """Whether the user has stopped the run."""
        return False


class RunJournal(Journal):
    """The journal of a run that trains.

    Args:
        run: the run's folder.
        display: shows the run's progress.
        config: the run's config.
    """

    def __init__(self, run: RunFolder, display: Display, config: RunConfig):
        self._run, self._display, self._config = run, display, config
        self._stopped = False
        self._seconds: dict[str, float] = {}  # of the last start

    def stop(self) -> None:
        """The user stops the run."""
        self._stopped = True
        self._run.request_stop("stop")

    def name(self) -> str | None:
        return monitor_name(self._run)

    def say(self, line: str) -> None:
        self._display.say(line)

    def progress(self) -> int:
        return len(self._run.read_metrics())

    def restarting(self, cause: str, workers: int, seconds: float) -> None:
        self._run.note_groups(self._seconds, cause=cause, workers=workers, waited=round(seconds, 1))
        self._seconds = {}
        self._display.expect_start()

    def started(self, seconds: Mapping[str, float]) -> None:
        self._seconds = {name: round(value, 1) for name, value in seconds.items()}
        with suppress(Exception):  # a tracker's: it never ends a run
            if connected():
                attempts = self._run.record["attempts"]
                Prometheus(self._config).restarts(sum(len(attempt.get("restarts", [])) for attempt in attempts))

    def ended(self) -> None:
        self._run.note_groups(self._seconds)

    def request_stop(self, reason: Reason) -> None:
        self._run.request_stop(reason)

    def clear_request(self) -> None:
        self._run.clear_request()
        if self._stopped:
            self._run.request_stop("stop")

    def stopping(self) -> bool:
        return self._stopped
