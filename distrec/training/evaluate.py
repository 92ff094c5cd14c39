"""`distrec evaluate RUN`: rank all items for the users of a split, with the best weights of a trained run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distrec.config.bounds import MOST_WORKERS, check_option
from distrec.config.paths import PATH_WIDTH, located
from distrec.config.run import RunConfig
from distrec.config.text import read_file, read_json
from distrec.config.tree import decode, set_keys
from distrec.data.dataset import Dataset
from distrec.data.parquet import parquet_bytes
from distrec.errors import InputError, shown
from distrec.methods.registry import resolve
from distrec.runtime import check_stack, quiet
from distrec.training.hold import require_free
from distrec.training.run_folder import RunFolder

if TYPE_CHECKING:
    from distrec.parallel.world import World


def evaluate(
    path: str, split: str = "test", workers: int = 0, mask: str | None = None, ks: Sequence[int] = ()
) -> dict[str, Any]:
    """Evaluate a run on `split`, print a table, write `<run>/evaluation/<split>.json` and return its value.

    Also writes `<split>-users.parquet`, every metric of every user, and `<split>-examples.json`, the histories and
    recommendations of six users of different activity. They are the same users in every run on the same data. The
    files of another mask than the run's own begin with `<split>-mask-<mask>`.

    Args:
        path: the run's folder, `<run.storage>/<run.name>`.
        split: "valid" or "test".
        workers: number of Ray Train workers; 0 evaluates in this process.
        mask: "train", "train+valid" or "none"; None: the run's own `evaluate.mask`.
        ks: cut-offs in addition to the run's own `evaluate.ks`.

    Raises:
        InputError: there is no such run, it is being trained or its training has not finished, or its dataset has
            changed.
    """
    check_stack()
    quiet()
    from distrec.evaluation.report import table
    from distrec.training.checkpoint import require_complete
    from distrec.training.launch import check_inputs, workers_for

    check_option("workers", workers, 0, MOST_WORKERS)
    path = located(path, "run")  # workers may have another working folder
    run, own = RunFolder.existing(path)
    require_free(run.folder, "run")  # training may delete the checkpoint that is read here
    best = run.summary()["best_checkpoint"]
    config = resolve(_ranking_by(own, split, workers, mask, ks))
    identity = run.record["identity"]
    if Dataset.open(config.data, checked=True).hash != identity["data"]:  # first, since a file may differ for that
        raise InputError(
            f"run '{path}' was trained on another dataset than the one now at '{config.data}'; restore that dataset or "
            "train again."
        )
    data = check_inputs(config).data
    data.users_table(), data.items_table()  # report a damaged file before any worker starts
    if best is not None:
        require_complete(run.checkpoints.folder(best))
    with workers_for(config) as start:
        start("distrec.training.evaluate:evaluate_worker", path=path, split=split)
    result: dict[str, Any] = run.folder.read_json("evaluation", f"{_files_of(split, own, config)}.json")
    print(table(result, path))
    return result


def compare(
    paths: Sequence[str], split: str, workers: int, beside: str | None, mask: str | None = None, ks: Sequence[int] = ()
) -> None:
    """Evaluate several runs and print one table that compares them.

    Args:
        paths: the runs' folders.
        split: as in `evaluate`.
        workers: as in `evaluate`.
        beside: a JSON file of further metrics for the table, `{split: {name: {metric: value}}}`; None: no file.
        mask: as in `evaluate`.
        ks: as in `evaluate`.

    Raises:
        InputError: as in `evaluate`; the runs have different masks and `mask` is None; they do not share the cut-off
            of the first run's metric; or `beside` cannot be read. Raised before anything is ranked.
    """
    from distrec.evaluation.report import comparison

    reference = {} if beside is None else _beside(beside, split)
    names = short_names(paths)
    configs = {path: _ranking_by(RunFolder.existing(path)[1], split, workers, mask, ks) for path in names}
    first, *_ = configs
    k = int(configs[first].train.metric.partition("@")[2])
    for path, config in configs.items():
        ours, theirs = configs[first].evaluate.mask, config.evaluate.mask
        if ours != theirs:
            raise InputError(
                f"run '{first}' ranks with mask '{ours}' and run '{path}' with mask '{theirs}', so their values cannot "
                "be compared; give one of them to all runs with --mask."
            )
        if k not in config.evaluate.ks:
            raise InputError(f"run '{path}' has no cut-off {k} in 'evaluate.ks', {config.evaluate.ks}; add --ks {k}.")
    results = {}
    for path, name in names.items():
        results[name] = evaluate(path, split, workers, mask, ks)
        print()
    print(comparison(results, reference, k))
    datasets = {RunFolder.existing(path)[0].record["identity"]["data"] for path in names}
    if len(datasets) > 1:
        print("\nThese runs were trained on different datasets, so their values cannot be compared.")


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The name of each run by its path: as many of the last parts of the paths as tell the runs apart.

    A run that is given several times is listed once.
    """
    distinct: dict[str, str] = {}
    for path in paths:
        distinct.setdefault(located(path).rstrip("/"), path)
    parts = {path: where.split("/") for where, path in distinct.items()}
    for count in range(1, max(map(len, parts.values())) + 1):
        names = {path: "/".join(own[-count:]) for path, own in parts.items()}
        if len(set(names.values())) == len(names):
            break
    return names


def _ranking_by(config: RunConfig, split: str, workers: int, mask: str | None, ks: Sequence[int]) -> RunConfig:
    """A run's config with the workers and the rule of an evaluation: split, mask and further cut-offs."""
    own = config.evaluate
    rule = {"mask": mask or own.mask, "ks": sorted({*own.ks, *ks}), "test": split == "test"}
    return decode(RunConfig, set_keys(config.model_dump(), {"evaluate": rule, "train.workers": workers}, "evaluate"))


def _files_of(split: str, own: RunConfig, used: RunConfig) -> str:
    """What the names of the files of an evaluation begin with. Another mask than the run's own has other files."""
    mask = used.evaluate.mask
    return split if mask == own.evaluate.mask else f"{split}-mask-{mask.replace('+', '-')}"


def _beside(path: str, split: str) -> dict[str, dict[str, float]]:
    """The metrics of `split` in the file of option `--beside`, by name and metric.

    Raises:
        InputError: the file cannot be read, or has another form.
    """
    where = f"file {shown(path, PATH_WIDTH)} of --beside"
    tree = read_json(read_file(path, "file of --beside"), where)
    found = tree.get(split) if isinstance(tree, dict) else None
    if not isinstance(found, dict):
        raise InputError(f"{where} has no metrics of split '{split}'; write {{split: {{name: {{metric: value}}}}}}.")
    for name, metrics in found.items():
        for metric, value in metrics.items() if isinstance(metrics, dict) else [("", metrics)]:
            if not metric or isinstance(value, bool) or not isinstance(value, int | float):
                place = f"{name}.{metric}" if metric else name
                raise InputError(
                    f"{where}: {shown(place)} of split '{split}' is {shown(value)}; write {{split: {{name: {{metric: "
                    "value}}}}, where each value is a number."
                )
    return found


def evaluate_worker(config: RunConfig, path: str, split: str) -> None:
    """Evaluate as one worker of an initialised process group."""
    from distrec.parallel.world import World

    world, (run, own) = World.current(), RunFolder.existing(path)
    _evaluate(world, run, own, config, split)
    world.barrier()  # no rank leaves before rank 0 has written the results


def _evaluate(world: World, run: RunFolder, own: RunConfig, config: RunConfig, split: str) -> None:
    import torch

    from distrec.evaluation.recommend import RECOMMENDED, examples, recommend, spread_users
    from distrec.evaluation.report import about, report, users_table
    from distrec.evaluation.slices import missing_items, slices
    from distrec.training.checkpoint import Checkpoints
    from distrec.training.engine import Engine
    from distrec.training.loop import build_evaluator, load_weights

    data = Dataset.open(config.data, checked=True)
    engine = Engine(world, data, config)
    summary = run.summary()
    if summary["best_checkpoint"] is not None:
        load_weights(engine, Checkpoints(run.checkpoints, world), summary["best_checkpoint"])
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
    lists = recommend(evaluator, chosen, final.users, final.items, engine.method.score, RECOMMENDED)
    if world.rank == 0:
        parts = slices(ranked, engine.train_rows, data.users, data.items, missing_items(data))
        told = about(ranked, summary, split, config.evaluate.mask)
        ids = data.users_table()["original"].take(ranked.user).combine_chunks()
        name = _files_of(split, own, config)
        histories = engine.histories(split)  # type: ignore[arg-type]
        users = users_table(ranked, ids, told)
        run.folder.write_bytes(parquet_bytes(users), "evaluation", f"{name}-users.parquet")
        run.folder.write_json(
            examples(evaluator, chosen, histories, data, lists, told), "evaluation", f"{name}-examples.json"
        )
        run.folder.write_json(report(ranked, parts, told, branches), "evaluation", f"{name}.json")
