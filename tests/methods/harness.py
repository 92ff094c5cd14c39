"""What workers do for `test_every_method.py`: every check is a function of a case and a dataset, run by all workers.

Nothing here names a method: cases, bounds and transcriptions lie beside the methods (`beside.py`).
"""

from __future__ import annotations

import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from distrec.config import RunConfig
from distrec.data.dataset import Dataset
from distrec.data.storage import open_folder
from distrec.errors import NonFiniteLoss
from distrec.methods.batch import Step
from distrec.methods.registry import METHODS, build_method, resolve
from distrec.parallel.world import World
from distrec.runtime import quiet
from distrec.training.checkpoint import Checkpoints
from distrec.training.loop import fit, load_weights
from distrec.training.run_folder import RunFolder
from tests.methods import beside
from tests.oracle.gather import dense_gradients, table_gradients, table_weights
from tests.training import small
from tests.training.trajectory import ADAM, Result, Run, Tolerance, config_of, engine_of, train, whole

STEPS, CUT = 14, 7  # of a trajectory, at least; and after which it is saved, within an epoch
MOST = 50  # rows of a batch
SPARSE = {"tables": "sparse", "lr": 2e-3}
EPOCHS, EPOCH_STEPS = 3, 5  # of the runs that crash
CRASHES = [(1, 0), (2, 3)]  # at the end of an epoch, and within one, a step after a checkpoint
SEED = 7
PATIENCE = timedelta(seconds=120)  # between the first and the last worker that ends a check

Job = tuple[str, str, str]
"""A check, a case and a dataset."""


class Failure(str):
    """The traceback of a check, in place of its result."""


def gradient_cases() -> dict[str, dict[str, Any]]:
    """The cases of methods with a transcription: those of all checks, and those that the transcription adds."""
    out: dict[str, dict[str, Any]] = {}
    for name in METHODS:
        if (plain := beside.plain(name)) is not None:
            out |= beside.cases(name)
            more = getattr(plain, "cases", {}).items()
            out |= {f"{name}, {title}": beside.settings(name) | settings for title, settings in more}
    return out


def run_of(case: str, data: str) -> Run:
    """A run whose results do not depend on the number of workers: without the dropout that does."""
    method = (beside.cases() | gradient_cases())[case]
    tolerance = Tolerance(**beside.small(method["name"]).tolerance)
    return Run(data, beside.steady(method), ADAM, SEED, tolerance=tolerance)


def samples_of(config: RunConfig) -> int:
    """The number of samples in an epoch; 0 if the method does not train."""
    data = Dataset.open(config.data)
    method = build_method(config, data)
    return len(method.sampler(data.interactions("train"), SEED)) if method.trainable else 0


def uneven(folder: str, run: Run) -> Run:
    """The run with batches of a size that leaves one row for an epoch's last batch: other workers then have none."""
    samples = samples_of(config_of(folder, run))
    sizes = [size for size in range(2, min(MOST, samples)) if (samples - 1) % size == 0]
    return replace(run, batch=max(sizes, default=max(1, samples - 1)))


def end_of(engine: Any) -> int:
    """The number of steps of a trajectory, which contains a whole epoch."""
    return max(STEPS, engine.steps_per_epoch)


# --- the checks: each returns what the tests compare ------------------------------------------------------------------


def trajectory(folder: str, case: str, data: str) -> Result:
    """Losses, ledgers, tensors and ranks of a run without an interruption, and the first batch's terms at the end."""
    engine = engine_of(config_of(folder, uneven(folder, run_of(case, data))))
    out = train(engine, stop=end_of(engine))
    if engine.method.trainable:
        out["again"], _ = engine.forward_backward(0, 0, engine.samples(0, 0))
    return out


def divided(folder: str, case: str, data: str) -> Result:
    """The same run in micro-batches, which may not change what a sum over rows is."""
    config = config_of(folder, uneven(folder, run_of(case, data)))
    config = config.model_copy(update={"train": config.train.model_copy(update={"accumulate": 3})})
    engine = engine_of(resolve(config))
    return train(engine, stop=end_of(engine))


def sparse(folder: str, case: str, data: str) -> Result:
    """A run whose tables update only the rows of the batch."""
    run = replace(run_of(case, data), optimizer=SPARSE)
    engine = engine_of(config_of(folder, uneven(folder, run)))
    return train(engine, stop=end_of(engine))


def save(folder: str, case: str, data: str) -> dict[str, np.ndarray]:
    """The state that is saved in the middle of a trajectory."""
    engine = engine_of(config_of(folder, uneven(folder, run_of(case, data))))
    train(engine, stop=CUT)
    tensors = {**engine.state(), "ledger": torch.zeros(engine.samples_per_epoch, dtype=torch.uint8)}
    checkpoints = Checkpoints(open_folder(f"{folder}/checkpoints"), engine.world)
    checkpoints.save(case, tensors, {"optimizer_steps": CUT})
    return whole(engine)


def proceed(folder: str, case: str, data: str) -> Result:
    """The rest of the trajectory that `save` began; `start` is the state that was loaded."""
    engine = engine_of(config_of(folder, uneven(folder, run_of(case, data))))
    load_weights(engine, Checkpoints(open_folder(f"{folder}/checkpoints"), engine.world), case)
    return train(engine, CUT, end_of(engine))


def poison(folder: str, case: str, data: str) -> dict[str, Any]:
    """After a step, the last worker's rows of a table become infinite: the next step's error, and what that step moves.

    A method without tables gets an infinite parameter of its dense module.
    """
    engine = engine_of(config_of(folder, run_of(case, data)))
    world, error = engine.world, ""
    engine.train_step(0, 0, engine.samples(0, 0))
    last = world.rank == world.size - 1
    tables = engine.method.tables()
    if tables and last:
        engine.tables.block(tables[0].name).data.fill_(torch.nan if world.size == 1 else torch.inf)
    elif not tables:
        name = next(iter(engine.dense.state())).removesuffix(".weight")
        engine.dense.set_weight(name, torch.full_like(engine.dense.state()[f"{name}.weight"], torch.inf))
    before = whole(engine)
    try:
        engine.train_step(1, 0, engine.samples(1, 0))
    except NonFiniteLoss as raised:
        error = str(raised)
    after = whole(engine)
    moved = [name for name, value in after.items() if not np.array_equal(value, before[name], equal_nan=True)]
    return {"error": error, "moved": moved}


def resume(folder: str, case: str, data: str) -> list[list[tuple[int, int]]]:
    """The steps of each attempt of a run that crashes twice; an uninterrupted run is beside it, in `runs_of`."""
    world, method = World.current(), beside.cases()[case]
    run = Run(data, method, ADAM | {"lr_decay": {"factor": 0.5, "epochs": 1.0}}, SEED)
    batch = -(-samples_of(config_of(folder, run)) // EPOCH_STEPS)
    attempts = []
    for name, crashes in (("whole", []), ("torn", CRASHES)):
        config = config_of(folder, replace(run, batch=batch))
        config = config.model_copy(
            update={
                "run": config.run.model_copy(update={"name": name, "storage": str(runs_of(folder, case, world.size))}),
                "train": config.train.model_copy(update={"epochs": EPOCHS, "checkpoint_every": 2}),
                "tracking": config.tracking.model_copy(update={"tensorboard": False}),
            }
        )
        dataset = Dataset.open(config.data)
        if world.rank == 0:
            RunFolder.of(config).open_attempt(config, dataset.hash)
        dist.barrier()
        for place in [*crashes, None]:
            with small.crash_at(*([place] if place else [])) as steps:
                try:
                    fit(world, dataset, config)
                except RuntimeError as error:
                    if str(error) != "crash":
                        raise
            attempts.append(steps)
    return attempts


def runs_of(folder: str, case: str, workers: int) -> Path:
    """Where `resume` writes its two runs."""
    return Path(folder, f"runs-{workers}", case)


def gradients(folder: str, case: str, data: str) -> list[str]:
    """Where terms, gradients or scores differ from the transcription's in float64, in the first and last two steps."""
    run = uneven(folder, run_of(case, data))
    engine = engine_of(config_of(folder, replace(run, optimizer={"name": "adam", "lr": 0.05})))
    end, seen = engine.steps_per_epoch, []
    names = {table: table for table in engine.tables.specs}
    for step in sorted({0, 1, end - 2, end - 1} & set(range(end))):
        samples, weights = engine.samples(0, step), weights_of(engine)
        terms, _ = engine.forward_backward(0, step, samples)
        found = table_gradients(engine, names) | dense_gradients(engine)
        engine.update()
        seen.append((Step(SEED, 0, step, len(samples.users), run.batch), samples, weights, terms, found))
    with torch.no_grad():
        final = engine.representations("valid")
        users = engine.world.gather_blocks(final.users, engine.space.users)
        scores = engine.method.score(users, engine.world.gather_blocks(final.items, engine.space.items)).double()
        weights = weights_of(engine)
    if engine.world.rank:  # all workers have the same
        return []
    plain, faults = beside.plain(run.method["name"])(engine.method), []
    for at, samples, exact, terms, found in seen:
        wanted = plain.terms(exact, samples, at)
        torch.stack(list(wanted.values())).sum().backward()
        if terms.keys() != wanted.keys():
            faults.append(f"step {at.step}: the terms are {sorted(terms)}, not {sorted(wanted)}")
        faults += [
            f"step {at.step}: '{name}' is {terms[name]}, not {float(value)}"
            for name, value in wanted.items()
            if name in terms and not np.isclose(terms[name], float(value.detach()), rtol=1e-5, atol=1e-6)
        ]
        for name, value in exact.items():
            grad = np.zeros(value.shape) if value.grad is None else value.grad.numpy()
            gap, largest = np.abs(found.get(name, 0) - grad).max(), np.abs(grad).max()
            if gap > 1e-4 * largest:
                faults.append(f"step {at.step}: the gradient of {name}, at most {largest:.1e}, is off by {gap:.1e}")
    if hasattr(plain, "scores"):
        theirs = plain.scores(weights).detach()
        gap = float((scores - theirs).abs().max() / theirs.std())
        faults += [f"scores are off by {gap:.1e} of their standard deviation"] if gap > 1e-4 else []
    return faults


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    """Tables and dense parameters by name, in float64, as leaves of autograd. Collective."""
    tables = table_weights(engine, {table: table for table in engine.tables.specs})
    dense = {name: value for name, value in engine.dense.state().items() if name.endswith(".weight")}
    values = {name: torch.from_numpy(value) for name, value in tables.items()}
    values |= {name.removesuffix(".weight"): value for name, value in dense.items()}
    return {name: value.double().requires_grad_() for name, value in values.items()}


CHECKS = {check.__name__: check for check in (trajectory, divided, sparse, save, proceed, poison, resume, gradients)}


def work(folder: str, jobs: list[Job]) -> dict[Job, Any]:
    """The results of checks at this number of workers, or the traceback of a check that fails on all of them."""
    quiet()
    out: dict[Job, Any] = {}
    for job in jobs:
        check, case, data = job
        try:
            out[job] = CHECKS[check](folder, case, data)
        except Exception:
            out[job] = Failure(traceback.format_exc())
        try:
            dist.monitored_barrier(timeout=PATIENCE)
        except RuntimeError as error:  # another worker is still within the check, and would wait for this one for ever
            raise RuntimeError(f"'{check}' of {case} on the data '{data}': {out[job]}") from error
    # The large results are the same on all workers.
    return {
        job: result
        for job, result in out.items()
        if World.current().rank == 0 or job[0] == "poison" or isinstance(result, Failure)
    }
