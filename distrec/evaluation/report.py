"""The result of an evaluation: the content of `<run>/evaluation/<split>.json`, a table by user, and plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from distrec.evaluation.ranking import Ranked
from distrec.evaluation.slices import Slice

METRICS = ("recall", "ndcg", "precision", "map", "hit")


def report(
    ranked: Ranked, slices: Sequence[Slice], split: str, mask: str, branches: Mapping[str, Ranked] | None = None
) -> dict[str, Any]:
    """The evaluation as a JSON value.

    `metrics` has the keys of `summary.json` (`recall@20`, …), and `intervals` has the 95 % interval over users of each
    metric. Both are empty in a slice without users. `masked_pairs` is the number of held-out pairs that the mask makes
    impossible to find; they count as not found.

    Args:
        ranked: the ranking of the whole split.
        slices: the parts of the split.
        split: the name of the split that was ranked.
        mask: the splits whose items were left out, as `evaluate.mask` names them.
        branches: for a method that combines several predictors, the whole split ranked by each predictor alone.
    """
    alone = {name: _part(branch) for name, branch in (branches or {}).items()}
    return {
        "split": split,
        "mask": mask,
        "interval": "95 % over users, normal approximation",
        **_part(ranked),
        "masked_pairs": int(ranked.masked.sum()),
        "slices": {part.name: {"meaning": part.meaning, **_part(part.ranked)} for part in slices},
        **({"branches": alone} if alone else {}),
    }


def users_table(ranked: Ranked) -> pa.Table:
    """Each metric of each user, for paired comparisons of runs.

    Returns:
        A table with `user` (int64, ascending) and a float64 column for each metric key.
    """
    return pa.table({"user": ranked.user.astype("int64"), **ranked.per_user})


def _part(ranked: Ranked) -> dict[str, Any]:
    return {
        "users": len(ranked.user),
        "pairs": len(ranked.item),
        "metrics": ranked.metrics(),
        "intervals": {name: list(ends) for name, ends in ranked.intervals().items()},
    }


def table(result: dict[str, Any], k: int) -> str:
    """A report as plain text: all metrics at all cut-offs, then Recall and NDCG at `k` of each slice and branch.

    Args:
        result: a report, as `report` returns it.
        k: one of the report's cut-offs.
    """
    metrics, intervals = result["metrics"], result["intervals"]
    ks = [name.removeprefix("recall@") for name in metrics if name.startswith("recall@")]
    whole = [["", *(f"@{cut}" for cut in ks)]]
    whole += [[name, *(_number(metrics, intervals, f"{name}@{cut}") for cut in ks)] for name in METRICS]
    parts = [["slice", "users", "pairs", f"recall@{k}", f"ndcg@{k}"]]
    for name, part in [("all", result), *result["slices"].items()]:
        numbers = (_number(part["metrics"], part["intervals"], f"{metric}@{k}") for metric in ("recall", "ndcg"))
        parts.append([name, str(part["users"]), str(part["pairs"]), *numbers])
    ranking = "all items" if result["mask"] == "none" else f"all items but {result['mask']} ones"
    note = f"{result['split']}: {result['users']} users, ranking {ranking}; ± 95 % over users"
    if result["masked_pairs"]:
        note += f"; {result['masked_pairs']} held-out pairs are masked and count as not found"
    lines = [note, "", *aligned(whole), "", *aligned(parts)]
    if "branches" in result:
        alone = [["branch", f"recall@{k}", f"ndcg@{k}"]]
        for name, part in [("fused", result), *result["branches"].items()]:
            numbers = (_number(part["metrics"], part["intervals"], f"{metric}@{k}") for metric in ("recall", "ndcg"))
            alone.append([name, *numbers])
        lines += ["", *aligned(alone)]
    return "\n".join(lines)


def comparison(results: Mapping[str, Mapping[str, Any]], beside: Mapping[str, Mapping[str, float]], k: int) -> str:
    """Several reports in one table, in ascending order of Recall, followed by reference values.

    Args:
        results: the reports, by run name.
        beside: the metrics of each reference, by name, such as the best possible ranking of generated data. `NAME_cold`
            holds the metrics of NAME on cold items.
        k: a cut-off that all reports have.
    """
    rows = [["", f"recall@{k}", f"ndcg@{k}", f"cold items: recall@{k}"]]
    for name, result in sorted(results.items(), key=lambda pair: float(pair[1]["metrics"].get(f"recall@{k}", 0))):
        cold = result["slices"]["items.cold"]
        numbers = [_number(result["metrics"], result["intervals"], f"{metric}@{k}") for metric in ("recall", "ndcg")]
        rows.append([name, *numbers, _number(cold["metrics"], cold["intervals"], f"recall@{k}")])
    for name, metrics in beside.items():
        if not name.endswith("_cold"):
            values = [
                metrics.get(f"recall@{k}"),
                metrics.get(f"ndcg@{k}"),
                beside.get(f"{name}_cold", {}).get(f"recall@{k}"),
            ]
            rows.append([f"({name})", *("-" if value is None else f"{value:.4f}" for value in values)])
    return "\n".join(aligned(rows))


def _number(metrics: dict[str, float], intervals: dict[str, list[float]], name: str) -> str:
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
