"""The result of an evaluation: the content of `<run>/evaluation/<split>.json`, a table by user, and plain text.

Every form names what was ranked: split, mask, cut-offs and number of users.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from distrec.evaluation.ending import ENDING, ending_words
from distrec.evaluation.ranking import Ranked
from distrec.evaluation.slices import Slice

METRICS = ("recall", "ndcg", "precision", "map", "hit")
SHOWN = ("recall", "ndcg")  # of slices and branches, the same for every method


def ranking_words(mask: str, split: str) -> str:
    """Which items a ranking of `split` contains, in words, with the value of `evaluate.mask`."""
    hidden = {"none": [], "train": ["train"], "train+valid": ["train", "valid"] if split == "test" else ["train"]}[mask]
    items = f"all items but the user's {' and '.join(hidden)} items" if hidden else "all items"
    return f"{items} (mask {mask})"


def report(
    ranked: Ranked, slices: Sequence[Slice], about: Mapping[str, Any], branches: Mapping[str, Ranked] | None = None
) -> dict[str, Any]:
    """The evaluation as a JSON value.

    `metrics` has the keys of `summary.json` (`recall@20`, …), and `intervals` has the 95 % interval over users of each
    metric. Both are empty in a slice without users. `masked_pairs` is the number of held-out pairs that the mask makes
    impossible to find; they count as not found.

    Args:
        ranked: the ranking of the whole split.
        slices: the parts of the split.
        about: what was ranked, as `about` returns it.
        branches: for a method that combines several predictors, the whole split ranked by each predictor alone.
    """
    alone = {name: _part(branch) for name, branch in (branches or {}).items()}
    return {
        **about,
        "interval": "95 % over users, normal approximation",
        **_part(ranked),
        "masked_pairs": int(ranked.masked.sum()),
        "slices": {part.name: {"meaning": part.meaning, **_part(part.ranked)} for part in slices},
        **({"branches": alone} if alone else {}),
    }


def about(ranked: Ranked, summary: Mapping[str, Any], split: str, mask: str) -> dict[str, Any]:
    """What a result is about: `run`, `method`, `split`, `mask`, `ks`, `users` and `training`, how training ended.

    Args:
        ranked: the ranking of the whole split.
        summary: the run's `summary.json`.
        split: the name of the split that was ranked.
        mask: the splits whose items were left out, as `evaluate.mask` names them.
    """
    return {
        "run": summary["run"],
        "method": summary["method"],
        "split": split,
        "mask": mask,
        "ks": list(ranked.ks),
        "users": len(ranked.user),
        "training": {key: summary[key] for key in ENDING},
    }


def users_table(ranked: Ranked, ids: pa.Array, about: Mapping[str, Any]) -> pa.Table:
    """Each metric of each user, for paired comparisons of runs.

    Args:
        ranked: the ranking of the whole split.
        ids: the original ids of `ranked.user`.
        about: what was ranked; the table's metadata holds it as JSON under the key `distrec`.

    Returns:
        A table with `user` (int64, ascending), `id` (string) and a float64 column for each metric key.
    """
    table = pa.table({"user": ranked.user.astype("int64"), "id": ids, **ranked.per_user})
    return table.replace_schema_metadata({"distrec": json.dumps(about)})


def _part(ranked: Ranked) -> dict[str, Any]:
    return {
        "users": len(ranked.user),
        "pairs": len(ranked.item),
        "metrics": ranked.metrics(),
        "intervals": {name: list(ends) for name, ends in ranked.intervals().items()},
    }


def table(result: dict[str, Any], run: str) -> str:
    """A report as plain text: all metrics, then Recall and NDCG of each slice and branch, each at all cut-offs.

    Args:
        result: a report, as `report` returns it.
        run: the name to show for the run, such as its path.
    """
    metrics, intervals, ks = result["metrics"], result["intervals"], result["ks"]
    note = f"{result['split']}: {result['users']:,} users, ranking {ranking_words(result['mask'], result['split'])}"
    note += "; ± 95 % over users"
    if result["masked_pairs"]:
        note += f"; {result['masked_pairs']} held-out pairs are masked and count as not found"
    whole = [["", *(f"@{k}" for k in ks)]]
    whole += [[name, *(_number(metrics, intervals, f"{name}@{k}") for k in ks)] for name in METRICS]
    lines = [f"{run}: {result['method']}, {ending_words(result['training'])}", note, "", *aligned(whole)]
    for metric in SHOWN:
        parts = [[f"{metric} by slice", "users", "pairs", *(f"@{k}" for k in ks)]]
        for name, part in [("all", result), *result["slices"].items()]:
            parts.append([name, str(part["users"]), str(part["pairs"]), *_at_all(part, metric, ks)])
        lines += ["", *aligned(parts)]
    for metric in SHOWN if "branches" in result else ():
        alone = [[f"{metric} by branch", *(f"@{k}" for k in ks)]]
        for name, part in [("fused", result), *result["branches"].items()]:
            alone.append([name, *_at_all(part, metric, ks)])
        lines += ["", *aligned(alone)]
    return "\n".join(lines)


def comparison(results: Mapping[str, Mapping[str, Any]], beside: Mapping[str, Mapping[str, float]], k: int) -> str:
    """Several reports in one table, in ascending order of Recall, followed by reference values.

    Args:
        results: the reports, by run name; all of the same split and mask.
        beside: the metrics of each reference, by name, such as the best possible ranking of generated data. `NAME_cold`
            holds the metrics of NAME on cold items.
        k: a cut-off that all reports have.
    """
    first = next(iter(results.values()))
    names = [f"{metric}@{k}" for metric in SHOWN]
    rows = [["", "users", *names, *(f"cold items: {name}" for name in names)]]
    for run, result in sorted(results.items(), key=lambda pair: float(pair[1]["metrics"][f"recall@{k}"])):
        cold = result["slices"]["items.cold"]
        numbers = [_number(part["metrics"], part["intervals"], name) for part in (result, cold) for name in names]
        rows.append([run, str(result["users"]), *numbers])
    for reference, metrics in beside.items():
        if not reference.endswith("_cold"):
            cold = beside.get(f"{reference}_cold", {})
            values = [part.get(name) for part in (metrics, cold) for name in names]
            rows.append([f"({reference})", "", *("-" if value is None else f"{value:.4f}" for value in values)])
    lines = [f"{first['split']}, ranking {ranking_words(first['mask'], first['split'])}", "", *aligned(rows)]
    short = [name for name, result in results.items() if result["training"]["best_is_last"]]
    if short:
        lines += ["", f"Still improving at the last evaluation: {', '.join(short)}; raise 'train.epochs'."]
    return "\n".join(lines)


def _at_all(part: Mapping[str, Any], metric: str, ks: Sequence[int]) -> list[str]:
    return [_number(part["metrics"], part["intervals"], f"{metric}@{k}") for k in ks]


def _number(metrics: Mapping[str, float], intervals: Mapping[str, list[float]], name: str) -> str:
    if name not in metrics:
        return "-"
    low, high = intervals[name]
    return f"{metrics[name]:.4f} ±{(high - low) / 2:.4f}"


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines of text, with the first column aligned left and the others aligned right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]
