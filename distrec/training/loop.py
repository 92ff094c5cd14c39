"""One worker's part of a run: restore, train, evaluate, checkpoint, choose the best epoch, rank the test split."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from distrec.config.run import RunConfig
from distrec.data.dataset import Dataset
from distrec.errors import InputError, Interrupted, NonFiniteLoss
from distrec.evaluation.ending import ending
from distrec.evaluation.ranking import Evaluator, Ranked
from distrec.methods.registry import stretches
from distrec.parallel.world import World
from distrec.runtime import release_memory
from distrec.tables.spec import plan_tables
from distrec.training.alike import alike
from distrec.training.checkpoint import Checkpoints
from distrec.training.engine import Engine
from distrec.training.heartbeat import phase
from distrec.training.ledger import Ledger
from distrec.training.run_folder import RunFolder, TakenOver, checkpoint_name, checkpoint_place, place_in_words
from distrec.training.saving import SAVE, STOP, Cursor, Saver
from distrec.training.stop import StopWatch
from distrec.training.trackers import Trackers


class Trainer:
    """One worker's part of one stretch of a run: the epochs between two `changes`, or all epochs without changes.

    Collective.

    Args:
        data: the prepared dataset.
        config: a resolved run config; the stretch ends after its `train.epochs`.
        checkpoints: those of the run.
        start: the number of epochs before the stretch; patience counts from there.
        total: the number of epochs of the whole run; None if this stretch is the last or only one.
        attempt: the number of this attempt in `run.json`; None: nobody else can train the run.
    """

    def __init__(
        self,
        world: World,
        data: Dataset,
        config: RunConfig,
        checkpoints: Checkpoints,
        start: int = 0,
        total: int | None = None,
        attempt: int | None = None,
    ):
        self.world, self.config, self.data = world, config, data
        self.start, self.total, self.attempt = start, total or config.train.epochs, attempt
        self.run = RunFolder.of(config)
        self.checkpoints = checkpoints
        self.engine = Engine(world, data, config)
        self.cursor = Cursor()
        self.ledger = Ledger(self.engine.samples_per_epoch)
        self.epochs = config.train.epochs if self.engine.method.trainable else 0
        self._saver = Saver(checkpoints, self.run, self._require_run)
        self._evaluators: dict[str, Evaluator] = {}
        self._trackers = Trackers(self.run, config, enabled=world.rank == 0)

    def train(self, newest: str | None) -> str | None:
        """Train from checkpoint `newest`, or from the beginning, to the end of the stretch.

        After the last stretch, the weights of the best epoch are loaded. They rank the validation split, and the test
        split if the config asks for it, and `summary.json` is written.

        Returns:
            The name of the newest checkpoint then.

        Raises:
            NonFiniteLoss: the message names the step, the term and the last good checkpoint.
            Interrupted: a stop was requested; the checkpoint has been written.
        """
        self._restore(newest)
        if self.world.rank == 0:
            self._record_plan()
        with StopWatch(self.run, self.world) as stop, self._saver:
            while self.cursor.epoch < self.epochs and not self.cursor.stopped:
                self._train_epoch(stop)
                self.end_epoch()
        last = self.config.train.epochs == self.total
        self._trackers.close(self.summarise() if last else None)
        return self._saver.newest

    def _train_epoch(self, stop: StopWatch) -> None:
        config, cursor, engine = self.config.train, self.cursor, self.engine
        steps = engine.steps_per_epoch
        engine.set_lr(self.config.optimizer.lr_at(cursor.epoch))
        started = time.perf_counter()
        before = cursor.seconds
        while cursor.step < steps:
            samples = engine.samples(cursor.epoch, cursor.step)
            try:
                terms, asked = engine.train_step(cursor.epoch, cursor.step, samples, self._ask(stop))
            except NonFiniteLoss as error:
                raise NonFiniteLoss(f"{error} {self._last_good()}") from None
            phase("training")
            self.ledger.mark(self.world, samples.rows)
            for name, value in terms.items():
                cursor.term_sums[name] = cursor.term_sums.get(name, 0.0) + value * len(samples.rows)
            cursor.step += 1
            cursor.optimizer_steps += 1
            cursor.seconds = before + time.perf_counter() - started
            self._progress(terms, len(samples.rows), steps)
            if cursor.step < steps and (
                asked or (config.checkpoint_every and cursor.step % config.checkpoint_every == 0)
            ):
                self._checkpoint()
            if asked == STOP:
                if cursor.step == steps:
                    self.end_epoch()
                self._saver.wait()
                raise Interrupted(f"stopped {place_in_words(**self._place())}; the same command continues from there.")

    def _ask(self, stop: StopWatch) -> int:
        """What I ask of all ranks with the next step. Only rank 0 asks, so that one clock and one watch decide."""
        if self.world.rank != 0:
            return 0
        return STOP if stop.requested else SAVE if self._saver.due(self.config.train.checkpoint_minutes) else 0

    def _last_good(self) -> str:
        with suppress(Exception):  # of the storage; the caller's error says more
            self._saver.wait()
        return f"Last good checkpoint: {self._saver.newest or 'none'}."

    def _place(self) -> dict[str, int]:
        """How far training has come, as `place_in_words` takes it."""
        steps = self.engine.steps_per_epoch
        return {"epoch": self.cursor.epoch, "epochs": self.total, "step": self.cursor.step, "steps": steps}

    def end_epoch(self) -> None:
        """Close the books of an epoch whose steps are done: rank the validation split, save, and start the next one."""
        cursor, rows = self.cursor, self.engine.samples_per_epoch
        epoch = cursor.epoch
        self.ledger.merge(self.world)
        release_memory()
        record: dict[str, Any] = {
            "epoch": epoch + 1,
            "loss": {name: total / rows for name, total in cursor.term_sums.items()},
            "lr": self.config.optimizer.lr_at(epoch),
            "ledger": self.ledger.close(),
            "replayed": cursor.replayed,
            "seconds": {"train": cursor.seconds, "evaluate": 0.0, "checkpoint": 0.0},
            "rows_per_second": rows / max(cursor.seconds, 1e-9),
            "workers": self.world.size,
        }
        last = epoch + 1 == self.epochs
        if (epoch + 1) % self.config.train.eval_every == 0 or last:
            started = time.perf_counter()
            metrics = self._rank("valid").metrics()
            record["seconds"]["evaluate"] = time.perf_counter() - started
            record["valid"] = metrics
            self._compare(metrics[self.config.train.metric], epoch)
        record["peak_memory_bytes"] = self._peak_memory()
        cursor.history.append(record)
        cursor.epoch, cursor.step, cursor.term_sums, cursor.seconds, cursor.replayed = epoch + 1, 0, {}, 0.0, 0
        history = list(cursor.history)

        def complete(seconds: float) -> None:  # perhaps while the next epoch trains, and appends to the cursor's list
            record["seconds"]["checkpoint"] = seconds
            self.run.write_metrics(history)
            self._trackers.epoch(record)

        self._checkpoint(complete)

    def _compare(self, value: float, epoch: int) -> None:
        cursor = self.cursor
        if value > cursor.best_value:
            cursor.best_value, cursor.best_epoch, cursor.evaluations_since_best = value, epoch + 1, 0
            cursor.best_checkpoint = checkpoint_name(epoch + 1, 0)
        else:
            cursor.evaluations_since_best += 1
            cursor.stopped = cursor.evaluations_since_best >= self.config.train.patience

    def _rank(self, split: Any) -> Ranked:
        if split not in self._evaluators:
            held_out = self.data.interactions(split)
            self._evaluators[split] = build_evaluator(self.engine, split, held_out, self.config)
        final = self.engine.representations(split)
        try:
            with torch.no_grad():
                return self._evaluators[split].rank(final.users, final.items, self.engine.method.score)
        except FloatingPointError as error:  # on every rank: the last update overflowed, and no loss followed it
            raise NonFiniteLoss(
                f"{error} after epoch {self.cursor.epoch + 1}. Lower 'optimizer.lr' or check the features. "
                f"{self._last_good()}"
            ) from None

    def summarise(self) -> dict[str, Any]:
        """Rank the splits with the weights of the best epoch, write `summary.json` and return it. Collective."""
        cursor, config = self.cursor, self.config
        if cursor.best_checkpoint is not None:
            load_weights(self.engine, self.checkpoints, cursor.best_checkpoint)
        ranked = {split: self._rank(split) for split in ("valid", *(["test"] if config.evaluate.test else []))}
        summary: dict[str, Any] = {
            "run": config.run.name,
            "method": self.engine.method.title(),
            "metric": config.train.metric,
            "mask": config.evaluate.mask,
            "ks": config.evaluate.ks,
            "users": {split: len(found.user) for split, found in ranked.items()},
            **ending(cursor.history, cursor.best_epoch, cursor.evaluations_since_best, self.epochs),
            "best_checkpoint": cursor.best_checkpoint,
            "seconds_per_epoch": _mean([record["seconds"]["train"] for record in cursor.history]),
            "peak_memory_bytes": self._peak_memory(),
            **{split: found.metrics() for split, found in ranked.items()},
        }
        with alike(self.world):
            if self.world.rank == 0:
                self._require_run()
                self.run.write_metrics(cursor.history)
                self.run.folder.write_json(summary, "summary.json")
        return summary

    def _require_run(self) -> None:
        """Check, on rank 0 and before anything is written or deleted, that no later attempt has taken over the run.

        Raises:
            TakenOver: one has.
        """
        if self.attempt is not None and self.run.taken_over(self.attempt):
            raise TakenOver(f"run '{self.run.folder}' was taken over by a later attempt.")

    def _checkpoint(self, then: Callable[[float], None] = lambda seconds: None) -> None:
        """Save the state; on an object store, in the background. `then` is as in `Saver.save`."""
        started, cursor = time.perf_counter(), self.cursor
        name = checkpoint_name(cursor.epoch, cursor.step)
        # Every rank passes the whole ledger: any one of them may write it.
        tensors = {**self.engine.state(), "ledger": self.ledger.merge(self.world)}
        self._check_finite(tensors)
        state = {**asdict(cursor), "data": self.data.hash}
        self._saver.save(name, tensors, state, self._needed(name), started, then)

    def _needed(self, name: str) -> set[str]:
        """The checkpoints that a run needs to continue from `name`, with the cursor that it holds."""
        return {name} if self.cursor.best_checkpoint is None else {name, self.cursor.best_checkpoint}

    def _check_finite(self, tensors: dict[str, Any]) -> None:
        """Raise NonFiniteLoss if a tensor is NaN or infinite: a run must not resume from such a checkpoint.

        This can happen after a finite loss, since its gradients need not be finite.
        """
        broken = [name for name, value in tensors.items() if not _local(value).isfinite().all()]
        if self.world.max_(torch.tensor(len(broken))):
            raise NonFiniteLoss(
                f"'{broken[0] if broken else 'a tensor'}' is NaN or infinite at epoch {self.cursor.epoch + 1}, step "
                f"{self.cursor.step}, though the loss was not. {self._last_good()}"
            )

    def _restore(self, name: str | None) -> None:
        if name is None:
            self._saver.resume(None, set())
            self._count_replayed()
            return
        state = self.checkpoints.state(name)
        if state.pop("data", None) != self.data.hash:
            raise InputError(
                f"checkpoint '{name}' in '{self.run.folder}' was made with another dataset than '{self.config.data}' "
                "now holds; restore that data or use another 'run.name'."
            )
        try:
            self.cursor = Cursor(**state)
        except TypeError:
            raise InputError(
                f"checkpoint '{name}' in '{self.run.folder}' was written by another version of distrec; train again "
                "under another 'run.name'."
            ) from None
        if checkpoint_place(name) != (self.cursor.epoch, self.cursor.step):
            raise InputError(
                f"checkpoint '{name}' in '{self.run.folder}' is of another epoch or step than its name says; restore "
                "it, or train again under another 'run.name'."
            )
        best = self.cursor.best_checkpoint
        if best not in (None, name) and (defect := self.checkpoints.defect(best)):
            raise InputError(
                f"checkpoint '{best}' of the best epoch in '{self.run.folder}' is damaged ({defect}); restore it, or "
                "train again under another 'run.name'."
            )
        self._saver.resume(name, self._needed(name))
        self.ledger.counts = load_weights(self.engine, self.checkpoints, name)
        if self.world.rank != 0:
            self.ledger.counts.zero_()
        if self.cursor.epoch == self.start:
            self.cursor.evaluations_since_best = 0
        if self.cursor.epoch < self.epochs:  # a larger train.epochs or patience lets a stopped run continue
            self.cursor.stopped = self.cursor.evaluations_since_best >= self.config.train.patience
        self._count_replayed()

    def _count_replayed(self) -> None:
        """Count the steps of this epoch that an earlier attempt made after the checkpoint and that will run again."""
        progress = self.run.read_progress()
        epoch, step = progress.get("epoch", 0), progress.get("step", 0)
        if epoch > self.cursor.epoch + 1:  # the newest checkpoint was incomplete: the rest of this epoch runs again
            epoch, step = self.cursor.epoch + 1, self.engine.steps_per_epoch
        if epoch == self.cursor.epoch + 1:
            self.cursor.replayed = progress["replayed"] + max(0, step - self.cursor.step)

    def _progress(self, terms: dict[str, float], rows: int, steps: int) -> None:
        if self.world.rank == 0:
            cursor = self.cursor
            progress = {
                "epoch": cursor.epoch + 1,
                "epochs": self.total,
                "step": cursor.step,
                "steps": steps,
                "replayed": cursor.replayed,
                "rows_per_second": round(cursor.step * self.config.train.global_batch / max(cursor.seconds, 1e-9)),
                "loss": {name: float(f"{value:.5g}") for name, value in terms.items()},
            }
            self.run.write_progress(progress)
            self._trackers.step(progress)

    def _record_plan(self) -> None:
        last = self.epochs == self.total
        self.run.note_start(self._place(), last and (self.cursor.stopped or self.cursor.epoch >= self.epochs))
        partitions = {"user": self.engine.space.users, "item": self.engine.space.items}
        self.run.update_record(
            world_size=self.world.size,
            plan=plan_tables(self.engine.method.tables(), partitions, self.config.optimizer),  # type: ignore[arg-type]
            graphs={name: graph.record() for name, graph in self.engine.method.graphs().items()},
        )

    def _peak_memory(self) -> int:
        """Peak resident memory in bytes, of the worker that used the most."""
        mine = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return int(self.world.max_(mine))


def fit(world: World, data: Dataset, config: RunConfig, attempt: int | None = None) -> None:
    """One worker's whole run, up to `summary.json`. Collective.

    The `changes` of the config divide a run into stretches of epochs with constant settings. Each stretch has its own
    trainer, with a new model and new optimizers, and loads the checkpoint that the previous stretch ended with. A
    resumed run skips the stretches that its newest checkpoint has completed, except the last, which writes the summary.
    """
    run = RunFolder.of(config)
    checkpoints, start = Checkpoints(run.checkpoints, world), 0
    newest, defects = checkpoints.newest_intact()
    if defects and world.rank == 0:
        run.note(damaged_checkpoints=defects)
    for stretch in stretches(config):
        end = stretch.train.epochs
        if end == config.train.epochs or newest is None or checkpoint_place(newest)[0] < end:
            trainer = Trainer(world, data, stretch, checkpoints, start, config.train.epochs, attempt)
            newest = trainer.train(newest)
            del trainer
            gc.collect()  # DeepSpeed's engine is part of reference cycles
        start = end


def build_evaluator(engine: Engine, split: str, held_out: Any, config: RunConfig) -> Evaluator:
    """The evaluator that ranks all items for a split, with the run's masking rule.

    Validation items are masked only when the test split is ranked.
    """
    masked = [] if config.evaluate.mask == "none" else [engine.train_rows]
    if config.evaluate.mask == "train+valid" and split == "test":
        masked.append(engine.space.data.interactions("valid"))
    return Evaluator(engine.world, engine.space.users, engine.space.items, held_out, masked, config.evaluate.ks)


def load_weights(engine: Engine, checkpoints: Checkpoints, name: str) -> torch.Tensor:
    """Load tables, dense weights, moments and step counts from a checkpoint. Collective.

    Returns:
        The checkpoint's ledger counts, `[samples per epoch]` uint8.
    """
    tensors = {**engine.state(), "ledger": torch.zeros(engine.samples_per_epoch, dtype=torch.uint8)}
    checkpoints.load(name, tensors)
    engine.load_dense(tensors, checkpoints.state(name)["optimizer_steps"])
    return tensors["ledger"]


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
