"""Run a config: check it and its data first, then start the workers, in this process or on Ray Train."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from distrec.cluster.connection import ray_cluster
from distrec.config.run import RunConfig, load_run
from distrec.data.check import damaged_file
from distrec.data.dataset import Dataset, Interactions
from distrec.data.histories import require_time_order
from distrec.data.manifest import CONTEXT, SPLITS
from distrec.data.ordered import distinct
from distrec.data.storage import open_folder
from distrec.errors import InputError, Interrupted, StorageError
from distrec.graph.cache import NOTE
from distrec.methods.registry import build_method, resolve, stretches
from distrec.runtime import check_stack, quiet, tune_process, versions
from distrec.training.attempts import with_absolute_paths
from distrec.training.display import Display, Inputs, banner
from distrec.training.hold import Hold
from distrec.training.journal import Journal, RunJournal
from distrec.training.run_folder import RunFolder, TakenOver
from distrec.training.size import check_disk, check_memory
from distrec.training.stop import on_stop_signal
from distrec.training.supervise import Supervisor
from distrec.training.worker import named

TRAIN = "distrec.training.worker:train_worker"


class Start(Protocol):
    """Runs work on workers; see `workers_for`."""

    def __call__(self, work: str, journal: Journal | None = None, **arguments: Any) -> None: ...


def train(
    config: RunConfig | str | Path,
    overrides: Sequence[str] = (),
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    *,
    held: bool = False,
) -> dict[str, Any]:
    """Train a model and return its `summary.json`. The same config again continues the run.

    Args:
        config: a run config, or the path of its YAML file.
        overrides: `dotted.key=value` settings, applied to a file.
        on_epoch: called, in another thread, with the record of each finished epoch.
        held: whether the caller has checked the data, and sees to it that nobody else trains this run, as a sweep does
            for its trials.

    Raises:
        InputError: the config or the data is invalid, or another attempt is training the run; raised before any worker
            starts. Also raised if another attempt took the run over.
        NonFiniteLoss: a loss term became NaN or infinite.
        Interrupted: Ctrl-C or SIGTERM stopped the run after it saved a checkpoint.
    """
    check_stack()
    quiet()
    run_config = with_absolute_paths(resolve(config if isinstance(config, RunConfig) else load_run(config, overrides)))
    inputs = check_inputs(run_config, Dataset.open(run_config.data, checked=True) if held else None)
    _check_graphs(run_config)
    run = RunFolder.of(run_config)
    with nullcontext() if held else Hold(run.folder, "run", run_config.run.storage) as hold:
        with workers_for(run_config) as start:
            attempt = len(run.open_attempt(run_config, inputs.data.hash)["attempts"])
            run.folder.abort_uploads()  # of attempts that died; nobody else may write here
            run.update_record(versions=versions(), degradations=inputs.degradations)
            print(banner(run_config, inputs, run), flush=True)
            display = Display(run, on_epoch)
            journal = RunJournal(run, display, run_config)
            try:
                with on_stop_signal(journal.stop), display:
                    start(TRAIN, journal, attempt=attempt)
            except BaseException as error:
                _note(run, hold, attempt, error)
                raise
        if hold is not None:
            hold.require()
        if run.taken_over(attempt):
            raise TakenOver(f"run '{run.folder}' was taken over by a later attempt; this one has stopped.")
        run.note_outcome(None)  # while the run is held: a later attempt writes to the same file
        return run.summary()


def _note(run: RunFolder, hold: Hold | None, attempt: int, error: BaseException) -> None:
    """Record how an attempt failed, if the run is still its own; a lost hold explains the error, so it is raised.

    Raises:
        InputError: another attempt took the run over.
    """
    if hold is not None and not isinstance(error, Interrupted | KeyboardInterrupt):
        with suppress(StorageError):  # it would explain less than the error at hand
            hold.require()
    with suppress(OSError, InputError):
        if not run.taken_over(attempt):
            run.note_outcome(error)


def _check_graphs(config: RunConfig) -> None:
    """Refuse a `run.graphs` that cannot be written: every run would silently compute its neighbour lists again."""
    if config.run.graphs is not None:
        try:
            open_folder(config.run.graphs).write_json(NOTE, "about.json")
        except OSError as error:
            raise InputError(
                f"key 'run.graphs' is '{config.run.graphs}', which cannot be written ({error}); give a writable "
                "folder or leave the key out."
            ) from None


def check_inputs(config: RunConfig, data: Dataset | None = None) -> Inputs:
    """Check a resolved config and its data, without a worker.

    Args:
        config: the config.
        data: the dataset that it names, if the caller has opened it and answers for what is in its feature files.

    Raises:
        InputError: names the first problem found.
    """
    train = config.train
    if train.global_batch < max(train.most_workers, 1):
        raise InputError(
            f"key 'train.global_batch' is {train.global_batch} but there are {train.most_workers} workers; "
            "give each at least one row."
        )
    cutoff = int(train.metric.partition("@")[2])
    if cutoff not in config.evaluate.ks:
        raise InputError(
            f"key 'train.metric' is '{train.metric}' but 'evaluate.ks' is {config.evaluate.ks}; add {cutoff} to it."
        )
    if config.tracking.mlflow and find_spec("mlflow") is None:
        raise InputError(
            "key 'tracking.mlflow' is set but MLflow is not installed; run 'pip install mlflow-skinny' or remove the "
            "key."
        )
    known = data is not None
    data = data or Dataset.open(config.data)
    method = build_method(config, data)
    check_memory(config, data, method)
    if not known:
        check_features(data, method.features())
    splits: dict[str, Interactions] = {
        split: data.interactions(split) for split in SPLITS if split != "test" or config.evaluate.test
    }
    for split, rows in splits.items():
        if not len(rows):
            raise InputError(f"data '{config.data}' has no {split} rows; prepare it with another split.")
    if method.reads_histories:
        unread = [name for name in (*SPLITS, CONTEXT) if name not in splits]
        require_time_order(data, splits | {name: data.interactions(name) for name in unread}, method.title())
    if method.trainable:
        sampler = method.sampler(splits["train"], train.seed)
        if not len(sampler):
            raise InputError(
                f"data '{config.data}' has no user with a training history long enough for {method.title()}; prepare "
                "it with a larger 'k_core.users'."
            )
        check_disk(config, data, method, len(sampler))
    degradations = ["no CUDA device is used: tensors and exchanges run on the CPU over gloo"]
    if config.optimizer.tables == "sparse":
        degradations.append(
            "sparse tables: row-wise Adagrad on looked-up rows replaces the dense optimizer (fbgemm has no fused Adam "
            "on the CPU)"
        )
    if config.dense.precision == "bf16":
        degradations.append(
            "dense modules compute in bfloat16: results for different numbers of workers agree only to its rounding"
        )
    if any(stretch.method.get(name) for stretch in stretches(config) for name in method.draws_dropout):
        degradations.append("each worker draws dropout of its own: results depend on the number of workers")
    ranked = {split: len(distinct(rows.user)) for split, rows in splits.items() if split != "train"}
    return Inputs(data, method, ranked, degradations + method.degradations())


def check_features(data: Dataset, names: Iterable[str]) -> None:
    """Compare the files of the feature sets `names` with their checksums.

    Raises:
        InputError: one differs or cannot be read.
    """
    parts = dict.fromkeys(part for name in names for part in data.feature(name).parts)
    if damage := damaged_file(data, parts):
        raise data.error(damage)


@contextmanager
def workers_for(config: RunConfig) -> Iterator[Start]:
    """A context with a function that runs work on the configured workers.

    Its arguments are the work, as "module:name" of a function that every worker calls with the config; a journal, by
    default one that prints; and further arguments of the work, by name. It raises what the work raises.

    Raises:
        InputError: the cluster has no room for the workers, and cannot get it, or did not in time.
    """
    if config.train.workers == 0:

        def here(work: str, journal: Journal | None = None, **arguments: Any) -> None:
            _run_here(config, work, arguments)

        yield here
        return
    with ray_cluster() as fixed:
        workers = Supervisor(config, Journal(), fixed).room()

        def start(work: str, journal: Journal | None = None, **arguments: Any) -> None:
            Supervisor(config, journal or Journal(), fixed).run(workers, work, arguments)

        yield start


def _run_here(config: RunConfig, work: str, arguments: dict[str, Any]) -> None:
    """Run in this process, as a process group of size 1."""
    import torch.distributed as dist

    from distrec.training.dense import leave_group

    tune_process(config.train.threads)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            named(work)(config, **arguments)
        finally:
            leave_group()
            gc.collect()  # DeepSpeed's engine is in reference cycles; its tensors would add up over runs in one process
