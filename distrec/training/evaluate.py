"""`distrec evaluate RUN`: rank all items for the users of a split, with the best weights of a trained run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from distrec.config.run import RunConfig
from distrec.data.dataset import Dataset
from distrec.data.storage import parquet_bytes
from distrec.errors import InputError
from distrec.methods.registry import resolve
from distrec.runtime import check_stack, quiet
from distrec.training.hold import require_free
from distrec.training.run_folder import RunFolder


def evaluate(path: str, split: str = "test", workers: int = 0) -> dict[str, Any]:
    """Evaluate a run on `split`, print a table, write `<run>/evaluation/<split>.json` and return its value.

    Also writes `<split>-users.parquet`, every metric of every user, and `<split>-examples.json`, the histories and
    recommendations of six users of different activity. They are the same users in every run on the same data.

    Args:
        path: the run's folder, `<run.storage>/<run.name>`.
        split: "valid" or "test".
        workers: number of Ray Train workers; 0 evaluates in this process.

    Raises:
        InputError: there is no such run, it is being trained or its training has not finished, or its dataset has
            changed.
    """
    check_stack()
    quiet()
    from distrec.evaluation.report import table
    from distrec.training.checkpoint import require_complete
    from distrec.training.launch import check_inputs, workers_for

    run, config = RunFolder.existing(path)
    require_free(run.folder, "run")  # training may delete the checkpoint that is read here
    best = run.summary()["best_checkpoint"]
    config = resolve(config.model_copy(update={"train": config.train.model_copy(update={"workers": workers})}))
    identity = run.record["identity"]
    data = Dataset.open(config.data)
    if data.hash != identity["data"]:
        raise InputError(
            f"run '{path}' was trained on another dataset than the one now at '{config.data}'; restore that dataset or "
            "train again."
        )
    check_inputs(config)
    data.users_table()  # the examples need it: report a damaged file before any worker starts
    if best is not None:
        require_complete(run.checkpoints.folder(best))
    with workers_for(config) as start:
        start(partial(evaluate_worker, path=path, split=split), config)
    result: dict[str, Any] = run.folder.read_json("evaluation", f"{split}.json")
    print(table(result, int(config.train.metric.partition("@")[2])))
    return result


def compare(paths: Sequence[str], split: str, workers: int, beside: str | None) -> None:
    """Evaluate several runs and print one table that compares them.

    Args:
        paths: the runs' folders.
        split: as in `evaluate`.
        workers: as in `evaluate`.
        beside: a JSON file of further metrics for the table, `{split: {name: {metric: value}}}`; None: no file.

    Raises:
        InputError: as in `evaluate`, or `beside` cannot be read.
    """
    from distrec.evaluation.report import comparison

    reference: dict[str, Any] = {}
    if beside is not None:
        try:
            reference = json.loads(Path(beside).read_text())[split]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"file '{beside}' has no metrics of split '{split}' ({error!r}); give a JSON file that has them."
            ) from None
    results = {}
    for path in paths:
        results[Path(path).name] = evaluate(path, split, workers)
        print()
    _, config = RunFolder.existing(paths[0])
    print(comparison(results, reference, int(config.train.metric.partition("@")[2])))


def evaluate_worker(config: RunConfig, path: str, split: str) -> None:
    """Evaluate as one worker of an initialised process group."""
    import torch

    from distrec.evaluation.recommend import RECOMMENDED, examples, recommend, spread_users
    from distrec.evaluation.report import report, users_table
    from distrec.evaluation.slices import missing_items, slices
    from distrec.parallel.world import World
    from distrec.training.checkpoint import Checkpoints
    from distrec.training.engine import Engine
    from distrec.training.loop import build_evaluator, load_weights

    world, data = World.current(), Dataset.open(config.data)
    run, _ = RunFolder.existing(path)
    engine = Engine(world, data, config)
    best = run.summary()["best_checkpoint"]
    if best is not None:
        load_weights(engine, Checkpoints(run.checkpoints, world), best)
    final = engine.representations(split)  # type: ignore[arg-type]
    with torch.no_grad():
        evaluator = build_evaluator(engine, split, data.interactions(split), config)  # type: ignore[arg-type]
        ranked = evaluator.rank(final.users, final.items, engine.method.score)
        branches = {
            name: evaluator.rank(
                final.users[:, part].contiguous(), final.items[:, part].contiguous(), engine.method.score
            )
            for name, part in engine.method.branches().items()
        }
    chosen = spread_users(evaluator.pairs.user, engine.train_rows)
    shown = recommend(evaluator, chosen, final.users, final.items, engine.method.score, RECOMMENDED)
    if world.rank == 0:
        parts = slices(ranked, engine.train_rows, data.users, data.items, missing_items(data))
        result = report(ranked, parts, split, config.evaluate.mask, branches)
        ids = data.users_table()["original"].take(evaluator.pairs.user[chosen]).to_pylist()
        shown_users = examples(evaluator, chosen, engine.histories(split), ids, shown)  # type: ignore[arg-type]
        run.folder.write_bytes(parquet_bytes(users_table(ranked)), "evaluation", f"{split}-users.parquet")
        run.folder.write_json(shown_users, "evaluation", f"{split}-examples.json")
        run.folder.write_json(result, "evaluation", f"{split}.json")
    world.barrier()
