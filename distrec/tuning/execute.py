"""Runs trials with Ray Tune. Each trial is a driver function that starts an ordinary training run.

Only the sweep folder is kept between attempts. Ray Tune provides the processes, their placement, retries and the
scheduler. Each attempt of a sweep is a new Tune experiment, which starts the trials that have not ended according to
the folder.
"""

from __future__ import annotations

import logging
import math
import os
import time
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.callback import Callback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from distrec.cluster.connection import on_cluster
from distrec.config.run import RunConfig
from distrec.config.tree import decode
from distrec.data.storage import open_folder
from distrec.errors import InputError, Interrupted, NonFiniteLoss, StorageError
from distrec.training.stop import on_stop_signal
from distrec.tuning.folder import ERROR_FILE, Phase, SweepFolder, Trial
from distrec.tuning.plan import Next
from distrec.tuning.ray_tune_internals import keep_keys_out_of_runtime_environments
from distrec.tuning.sweep import SweepConfig

_NOTE_SECONDS = 5.0  # a running trial's time is written to its file this often


class Execution:
    """Runs the trials of one phase until its source has no more.

    Args:
        source: returns the trial to start next; see `distrec.tuning.plan.Next`.
        concurrent: the number of trials that run at the same time.
        on_end: called with each trial that has ended.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        folder: SweepFolder,
        phase: Phase,
        source: Callable[[], Next],
        concurrent: int,
        on_end: Callable[[Trial], None],
    ):
        self.sweep, self.folder, self.phase, self.source = sweep, folder, phase, source
        self.concurrent, self.on_end = concurrent, on_end
        self.stopping = False
        self.running: dict[str, _Running] = {}  # by Ray Tune's id

    def run(self) -> None:
        """Run all trials of the phase.

        Raises:
            Interrupted: Ctrl-C or SIGTERM arrived; running trials have saved checkpoints.
        """
        keep_keys_out_of_runtime_environments()
        tuner = tune.Tuner(
            tune.with_resources(run_trial, self._resources()),
            tune_config=tune.TuneConfig(
                search_alg=_Feed(self),
                scheduler=self._scheduler(),
                num_samples=-1,
                max_concurrent_trials=self.concurrent,
                trial_dirname_creator=_name,
                trial_name_creator=_name,
            ),
            run_config=self._run_config(),
        )
        with on_stop_signal(self._ask_to_stop):
            on_cluster(tuner.fit)
        if self.stopping:
            raise Interrupted("stopped; the same command continues the sweep.")

    def _resources(self) -> dict[str, float]:
        """What Ray reserves for the trial's process.

        Without Ray Train workers, that is the trial's CPUs. With workers, which reserve their own CPUs, it is a token
        amount of memory, because Ray Tune needs some resource to be reserved.
        """
        resources = self.sweep.resources
        return {"CPU": resources.cpus_per_worker} if resources.workers == 0 else {"CPU": 0, "memory": 1 << 20}

    def _scheduler(self) -> TrialScheduler:
        if self.sweep.scheduler != "asha" or self.phase == "final":
            return FIFOScheduler()
        return _PerMethod(self.sweep, self.folder)

    def _run_config(self) -> tune.RunConfig:
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # Ray Tune's new display appears even at verbosity 0
        logging.getLogger("ray.tune").setLevel(logging.ERROR)  # Ray Tune warns about callbacks that are not used here
        logs = self.folder.folder.folder("tune")
        callbacks: list[Callback] = [_Failures(self)]
        tracking = self.sweep.tracking
        if tracking.tensorboard:
            from ray.tune.logger import TBXLoggerCallback

            callbacks.append(TBXLoggerCallback())
        if tracking.mlflow:
            from ray.air.integrations.mlflow import MLflowLoggerCallback

            callbacks.append(MLflowLoggerCallback(tracking_uri=tracking.mlflow, experiment_name=self.sweep.run.name))
        return tune.RunConfig(
            name=f"{self.phase}-{len(self.folder.record['attempts'])}",
            storage_path=logs.path,
            storage_filesystem=PyFileSystem(FSSpecHandler(logs.fs)),
            failure_config=tune.FailureConfig(max_failures=self.sweep.retries),
            callbacks=callbacks,
            verbose=0,
            log_to_file=True,
        )

    def _ask_to_stop(self) -> None:
        self.stopping = True
        for running in list(self.running.values()):
            self.folder.run(self.phase, running.trial).request_stop()


def _name(trial: Any) -> str:
    """Ray Tune's name for a trial. A trial of a population gets one for each stretch of epochs that it trains."""
    config = trial.config
    return f"{config['name']}-to-{config['run']['train']['epochs']}" if config["stretch"] else str(config["name"])


class _Running:
    """A trial that Ray Tune runs, and the time it has been running."""

    def __init__(self, trial: Trial):
        self.trial, self._since, self._noted = trial, time.monotonic(), 0.0

    def add_time(self) -> bool:
        """Add the time since the last call to the trial's; return whether its file should be written now."""
        now = time.monotonic()
        self.trial.seconds += now - self._since
        self._since = now
        due = now - self._noted > _NOTE_SECONDS
        if due:
            self._noted = now
        return due


class _Feed(Searcher):
    """Gives trials to Ray Tune and records how they end."""

    def __init__(self, execution: Execution):
        super().__init__()
        self.execution = execution

    def suggest(self, trial_id: str) -> Any:
        execution = self.execution
        found = None if execution.stopping else execution.source()
        if found is None:
            return Searcher.FINISHED
        if found == "later":
            return None
        trial, config = found
        trial.status = "running"
        execution.folder.write_trial(execution.phase, trial)
        execution.running[trial_id] = _Running(trial)
        return {
            "name": trial.id,
            "stretch": trial.pause is not None or trial.paused > 0,
            "entry": trial.entry,
            "run": config.model_dump(),
            "metric": execution.sweep.metric,
            "evaluate": execution.phase == "final",
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        running = self.execution.running[trial_id]
        _take_values(running.trial, result, self.execution.sweep.metric)
        if running.add_time():
            self.execution.folder.write_trial(self.execution.phase, running.trial)
        if self.execution.stopping:  # ask again: a trial that was just starting ignored the first request as an old one
            self.execution.folder.run(self.execution.phase, running.trial).request_stop()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        execution, result = self.execution, result or {}
        running = execution.running.pop(trial_id)
        trial = running.trial
        running.add_time()
        _take_values(trial, result, execution.sweep.metric)  # a trial's last result is passed only here
        if error:
            trial.status = "failed"
            trial.reason = execution.folder.error(execution.phase, trial) or "its process died without an error message"
        elif "refused" in result:
            trial.status, trial.reason = "failed", result["refused"]
        elif "interrupted" in result:
            trial.status = "waiting"
        elif "finished" in result:
            trial.finish(result["epoch"])
        else:
            trial.status = "stopped"
        execution.folder.write_trial(execution.phase, trial)
        execution.on_end(trial)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the sweep folder holds all state."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing, for the same reason."""


def _take_values(trial: Trial, result: dict[str, Any], metric: str) -> None:
    if "best" in result:  # a continued trial reports its epochs again, from the first
        trial.value = max(result["best"], -1.0 if trial.value is None else trial.value)
    if "finished" not in result:  # the final result holds the value of the best epoch, not of the last
        trial.last = result.get(metric, trial.last)


class _Failures(Callback):
    """Counts how often a trial's process failed, including the times when it was started again."""

    def __init__(self, execution: Execution):
        self.execution = execution

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._count(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._count(trial)

    def _count(self, trial: Any) -> None:
        running = self.execution.running.get(trial.trial_id)
        if running is not None:
            running.trial.failures += 1
            self.execution.folder.write_trial(self.execution.phase, running.trial)


class _PerMethod(FIFOScheduler):
    """Asynchronous successive halving (Li et al. 2020) among the trials of each method.

    Methods are separate because they learn at different speeds. A trial keeps its name over all attempts of the sweep:
    rungs hold the results of earlier attempts, and epochs that a continued trial reports again are not judged again.
    """

    def __init__(self, sweep: SweepConfig, folder: SweepFolder):
        super().__init__()
        self._sweep, self._folder = sweep, folder
        self._earlier = folder.trials("trials")
        self._schedulers: dict[str, ASHAScheduler] = {}
        self._last_epoch: dict[str, int] = {}  # of earlier attempts, by trial

    def _of(self, trial: Any) -> ASHAScheduler:
        label = trial.config["entry"]
        if label not in self._schedulers:
            epochs = max(trial.config["run"]["train"]["epochs"], self._sweep.asha.grace)
            self._schedulers[label] = ASHAScheduler(
                time_attr="epoch",
                metric="best",
                mode="max",
                max_t=epochs,
                grace_period=self._sweep.asha.grace,
                reduction_factor=self._sweep.asha.factor,
                stop_last_trials=False,
            )
            self._tell_earlier(label)
        return self._schedulers[label]

    def _tell_earlier(self, label: str) -> None:
        nobody: Any = None
        for trial in self._earlier:
            if trial.entry == label:
                best = -1.0
                self._schedulers[label].on_trial_add(nobody, _known(trial.id))
                for record in self._folder.run("trials", trial).read_metrics():
                    if "valid" in record:
                        best = max(best, record["valid"][self._sweep.metric])
                        result = {"epoch": record["epoch"], "best": best}
                        self._schedulers[label].on_trial_result(nobody, _known(trial.id), result)
                        self._last_epoch[trial.id] = record["epoch"]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_add(tune_controller, _known(trial.config["name"]))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        name = trial.config["name"]
        if result.get("epoch", math.inf) <= self._last_epoch.get(name, 0):
            return TrialScheduler.CONTINUE
        return str(self._of(trial).on_trial_result(tune_controller, _known(name), result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._of(trial).on_trial_complete(tune_controller, _known(trial.config["name"]), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_remove(tune_controller, _known(trial.config["name"]))


def _known(name: str) -> Any:
    """A stand-in for a trial with the one attribute that successive halving reads."""
    return SimpleNamespace(trial_id=name)


def run_trial(task: dict[str, Any]) -> None:
    """Train one trial in its own process, report each epoch to Ray Tune, and evaluate if the task says so."""
    from distrec.training.evaluate import evaluate
    from distrec.training.launch import train

    logging.getLogger("ray").setLevel(logging.ERROR)
    config, metric = decode(RunConfig, task["run"]), task["metric"]
    folder = open_folder(config.run.storage).folder(config.run.name)
    best = -1.0

    def report(record: dict[str, Any]) -> None:
        nonlocal best
        if "valid" in record:
            value = record["valid"][metric]
            best = max(best, value)
            tune.report({metric: value, "best": best, "epoch": record["epoch"]})

    try:
        summary = train(config, on_epoch=report, held=True)
        if task["evaluate"]:
            evaluate(str(folder), "test", config.train.most_workers)
    except Interrupted:
        tune.report({"interrupted": True})
    except Exception as error:
        if isinstance(error, InputError | NonFiniteLoss) and not isinstance(error, StorageError):
            tune.report({"refused": f"{type(error).__name__}: {error}"})  # a retry would fail in the same way
            return
        folder.write_bytes(traceback.format_exc().encode(), ERROR_FILE)
        raise
    else:
        value = summary["valid"][metric]
        tune.report({metric: value, "best": max(best, value), "epoch": summary["epochs"], "finished": True})
