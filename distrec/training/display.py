"""The printed output of a run: the banner, a progress bar, one line per epoch, the final table.

Workers write their progress to the run folder, and the driver reads it there, wherever the workers run.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from tqdm import tqdm

from distrec.config.run import RunConfig
from distrec.data.dataset import Dataset
from distrec.errors import InputError
from distrec.evaluation.ending import ending_words
from distrec.evaluation.report import ranking_words
from distrec.methods.base import Method
from distrec.training.run_folder import RunFolder, place_in_words

_LONG_SAVE = 1.0  # seconds that a checkpoint takes above which a stop needs to be given time


class Inputs(NamedTuple):
    """What a run is made from, checked.

    Attributes:
        data: the dataset.
        method: the method.
        ranked: the number of users with held-out rows in each split that the run ranks.
        degradations: the run's slower or approximate choices, one sentence each.
    """

    data: Dataset
    method: Method
    ranked: dict[str, int]
    degradations: list[str]


def banner(config: RunConfig, inputs: Inputs, run: RunFolder) -> str:
    """The lines printed at the start of a run; each degradation is one of them."""
    train, rule, data = config.train, config.evaluate, inputs.data
    least, most = train.least_workers, train.most_workers
    workers = f"{least if least == most else f'{least} to {most}'} Ray Train workers" if most else "in this process"
    lines = [
        f"distrec: {inputs.method.title()} on {data.manifest.name} ({data.users:,} users, {data.items:,} items, "
        f"{data.manifest.interactions['train']:,} training rows)",
        f"  run      {run.folder}",
        f"  workers  {workers}, {train.threads} thread(s) each, global batch {train.global_batch:,}, "
        f"{config.optimizer.tables} tables, ZeRO {config.dense.zero_stage}, seed {train.seed}",
        *(
            f"  {split:<7}  {users:,} users, ranking {ranking_words(rule.mask, split)}, "
            f"cut-offs {', '.join(map(str, rule.ks))}"
            for split, users in inputs.ranked.items()
        ),
    ]
    return "\n".join(lines + [f"  note     {line}" for line in inputs.degradations])


class Display:
    """Shows the progress of a run until the block ends.

    Args:
        run: the run's folder.
        on_epoch: called with each epoch's record in `metrics.jsonl`, including those of earlier attempts.
    """

    def __init__(self, run: RunFolder, on_epoch: Callable[[dict[str, Any]], None] | None = None):
        self._run, self._on_epoch = run, on_epoch
        self._seconds = 0.5 if run.folder.local else 5.0
        self._done = threading.Event()
        self._shown, self._said_start = 0, False
        self._said_damaged: set[str] = set()
        self._said: set[str] = set()
        self._said_seconds = 0.0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> Display:
        before = self._run.read_metrics()
        self._shown = len(before)
        for record in before:
            self._report(record)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()
        if self._bar is not None:
            self._bar.close()
        self._show_epochs()

    def _watch(self) -> None:
        while not self._done.wait(self._seconds):
            self._show_epochs()
            progress = self._run.read_progress()
            if progress and sys.stderr.isatty():
                self._show_bar(progress)

    def _show_bar(self, progress: dict[str, Any]) -> None:
        if self._bar is None:
            self._bar = tqdm(unit="step", dynamic_ncols=True, leave=False)
        self._bar.total = progress["epochs"] * progress["steps"]
        self._bar.n = (progress["epoch"] - 1) * progress["steps"] + progress["step"]
        self._bar.set_description(f"epoch {progress['epoch']}/{progress['epochs']}", refresh=False)
        terms = {name: f"{value:.4g}" for name, value in progress["loss"].items()}
        self._bar.set_postfix({**terms, "rows/s": f"{progress['rows_per_second']:,}"}, refresh=False)
        self._bar.refresh()

    def say(self, line: str) -> None:
        """Print a line, above the progress bar if there is one."""
        tqdm.write(line)
        sys.stdout.flush()

    def expect_start(self) -> None:
        """Workers start again, so that there is a new place to tell where they begin."""
        self._said_start = False

    def _say_start(self) -> None:
        """Say, once, where the workers begin: they know which checkpoint they could read."""
        if self._said_start:
            return
        with suppress(InputError):  # the workers would fail too
            attempt = self._run.record["attempts"][-1]
            start = (attempt.get("restarts") or [attempt])[-1].get("start")
            if start is None:
                return
            for name, defect in attempt.get("damaged_checkpoints", {}).items():
                if name not in self._said_damaged:
                    tqdm.write(f"checkpoint '{name}' is not used: {defect}")
                    self._said_damaged.add(name)
            self._said_start, ended = True, start.pop("ended")
            if ended:
                tqdm.write(
                    f"training ended before, after epoch {start['epoch']}: nothing is trained now, and the weights of "
                    "the best epoch are ranked again"
                )
            elif start["epoch"] or start["step"]:
                tqdm.write(f"continuing {place_in_words(**start)}")

    def _say_notes(self) -> None:
        """Say what the workers have noted in the record: trackers that failed, and how long a stop takes."""
        with suppress(InputError):  # the workers would fail too
            record = self._run.record
            for warning in record.get("warnings", []):
                if warning not in self._said:
                    self._said.add(warning)
                    tqdm.write(f"warning: {warning}")
            seconds = record.get("checkpoint", {}).get("seconds", 0.0)
            if seconds > 2 * self._said_seconds and seconds >= _LONG_SAVE:
                self._said_seconds = seconds
                tqdm.write(
                    f"a checkpoint takes {seconds:.0f} s: give a stop at least {2 * seconds + 5:.0f} s before the "
                    "process is killed (docs/cluster.md, section 4)"
                )

    def _show_epochs(self) -> None:
        self._say_start()
        records = self._run.read_metrics(self._shown)
        for record in records:
            tqdm.write(epoch_line(record))
            self._shown += 1
            self._report(record)
        if records:
            self._say_notes()

    def _report(self, record: dict[str, Any]) -> None:
        if self._on_epoch is not None:
            self._on_epoch(record)


def epoch_line(record: dict[str, Any]) -> str:
    """The line printed for a finished epoch."""
    loss = "  ".join(f"{name} {value:.4f}" for name, value in record["loss"].items())
    valid = record.get("valid", {})
    shown = [name for name in ("recall@20", "ndcg@20") if name in valid] or list(valid)[:2]
    metrics = "  ".join(f"{name} {valid[name]:.4f}" for name in shown)
    seconds = record["seconds"]
    replayed = f"  replayed {record['replayed']} steps" if record["replayed"] else ""
    return (
        f"epoch {record['epoch']:>4}  {loss}  | valid {metrics or '-'}  | {seconds['train']:.2f} s train, "
        f"{seconds['evaluate']:.2f} s evaluate, {record['rows_per_second']:,.0f} rows/s{replayed}"
    )


def summary_table(summary: dict[str, Any]) -> str:
    """The lines printed at the end of a run: how training ended, what was ranked, and the metrics of the best epoch."""
    splits = [split for split in ("valid", "test") if split in summary]
    lines = [f"{summary['method']}: {ending_words(summary)}"]
    for split in splits:
        lines.append(f"  {split}: {summary['users'][split]:,} users, ranking {ranking_words(summary['mask'], split)}")
    lines.append("  " + "metric".ljust(14) + "".join(split.rjust(9) for split in splits))
    for name in summary["valid"]:
        lines.append("  " + name.ljust(14) + "".join(f"{summary[split][name]:9.4f}" for split in splits))
    return "\n".join(lines)
