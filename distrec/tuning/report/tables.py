"""The tables of the report, as cells of text. The page, the Markdown file and the terminal show the same tables."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from distrec.tuning.report.gather import metrics_shown
from distrec.tuning.report.parallel import short
from distrec.tuning.report.words import (
    by_label,
    display_names,
    hours,
    memory,
    metric_name,
    p_value,
    plural,
    runs_shown,
    seconds,
    signed,
    trial_counts,
)

NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; the first cell of a row names it. `labels`, if any, gives each row's entry."""

    head: list[str]
    rows: list[list[str]]
    labels: list[str] = field(default_factory=list)


def shown_metrics(report: dict[str, Any]) -> list[str]:
    """The sweep's metric first, then recall, NDCG and hit rate at the same cut-off where they were measured."""
    metric, *more = metrics_shown(report["sweep"]["metric"])
    measured = {name for entry in report["entries"] for name in entry["test"]}
    return [metric, *(name for name in more if name in measured)]


def leaderboard(report: dict[str, Any]) -> Table:
    """Test means over seeds, the difference to the baseline and the best validation value.

    Without any test values, the table holds the validation values only.
    """
    entries, names, shown = by_label(report), display_names(report), shown_metrics(report)
    metric, tested = report["sweep"]["metric"], any(entry["test"] for entry in report["entries"])
    head = ["method", "reads"]
    if tested:
        head += [f"test {metric_name(metric)}", "difference to the baseline", "95 % interval over users", "p (Holm)"]
        head += [*(f"test {metric_name(name)}" for name in shown[1:]), "seeds"]
    head.append(f"best trial, validation {metric_name(metric)}")
    rows = []
    for label in report["order"]:
        entry = entries[label]
        best = next((trial["value"] for trial in entry["trials"] if trial["id"] == entry["best"]), None)
        row = [names[label], _reads(entry)]
        if tested:
            row += [_mean(entry["test"].get(metric)), *_difference(report, entry)]
            row += [*(_mean(entry["test"].get(name)) for name in shown[1:])]
            row.append(str(sum(bool(seed["test"]) for seed in entry["seeds"])))
        rows.append([*row, NOTHING if best is None else f"{best:.4f}"])
    return Table(head, rows, list(report["order"]))


def cost(report: dict[str, Any]) -> Table:
    """The number of trials of each entry, and what they cost."""
    entries, names = by_label(report), display_names(report)
    head = [
        "method",
        "trials finished",
        "failed",
        "search, CPU hours",
        "fresh seeds, CPU hours",
        "time of all runs",
        "per epoch",
        "peak memory",
    ]
    rows = []
    for label in report["order"]:
        entry, spent = entries[label], entries[label]["cost"]
        finished, begun = trial_counts(entry)
        clones = sum(trial["parent"] is not None for trial in entry["trials"])
        stopped = entry["counts"]["stopped"] - sum(trial["replaced"] for trial in entry["trials"])
        notes = [
            f"{count} {what}"
            for count, what in ((stopped, "stopped early"), (clones, plural(clones, "clone")))
            if count
        ]
        rows.append(
            [
                names[label],
                ", ".join([f"{finished} of {begun}", *notes]),
                str(entry["counts"]["failed"]),
                *(_or(spent[key], hours) for key in ("search_cpu_hours", "final_cpu_hours")),
                *(_or(spent[key], seconds) for key in ("seconds", "seconds_per_epoch")),
                _or(spent["peak_memory_bytes"], memory),
            ]
        )
    return Table(head, rows, list(report["order"]))


def trials(report: dict[str, Any], entry: dict[str, Any]) -> Table:
    """Every trial of an entry, best first."""
    parameters = sorted({name for trial in entry["trials"] for name in trial["values"]})
    head = [
        "trial",
        f"validation {metric_name(report['sweep']['metric'])}",
        *parameters,
        "best epoch",
        "epochs",
        "CPU hours",
        "status",
    ]
    rows, numbers = [], {trial["id"]: trial["number"] for trial in entry["trials"]}
    for trial in sorted(entry["trials"], key=lambda trial: -(-1.0 if trial["value"] is None else trial["value"])):
        status = "replaced" if trial["replaced"] else trial["status"]
        status += f": {trial['reason']}" if trial["reason"] else ""
        again = f", restarted {trial['failures']} {plural(trial['failures'], 'time')}" if trial["failures"] else ""
        number = f"{trial['number']}" + (", winner" if trial["id"] == entry["winner"] else "")
        if trial["parent"]:
            number += f", from epoch {trial['born']} a clone of {numbers.get(trial['parent'], 'another')}"
        rows.append(
            [
                number,
                _or(trial["value"], "{:.4f}".format),
                *(short(trial["values"][name]) if name in trial["values"] else NOTHING for name in parameters),
                _or(trial["epoch"], str),
                str(trial["epochs"]),
                _or(trial["cpu_hours"], hours),
                status + _ended(trial) + again,
            ]
        )
    return Table(head, rows)


def importance(entry: dict[str, Any]) -> Table:
    """The share of the variance of the trials' values that each varied parameter explains."""
    head = ["parameter", "share", "chance alone", "trials", "computed from"]
    kinds = {"range": "rank correlation", "choices": "means of the choices"}
    rows = [
        [row["parameter"], f"{row['share']:.2f}", f"{row['chance']:.2f}", str(row["trials"]), kinds[row["kind"]]]
        for row in entry["importance"]
    ]
    return Table(head, rows)


def slices(report: dict[str, Any]) -> list[Table]:
    """For each metric, a table of its value in each part of the test split, with a column for each entry."""
    names = display_names(report)
    measured = [entry for label in report["order"] if (entry := by_label(report)[label])["slices"]]
    parts = {name: part for entry in measured for name, part in entry["slices"].items()}
    out = []
    for metric in shown_metrics(report):
        rows = [
            [
                f"{name}: {part['meaning']}" if part["meaning"] else name,
                f"{part['users']:,}",
                *(_mean(entry["slices"].get(name, {"metrics": {}})["metrics"].get(metric)) for entry in measured),
            ]
            for name, part in parts.items()
        ]
        out.append(Table([metric_name(metric), "users", *(names[entry["label"]] for entry in measured)], rows))
    return out


def training(report: dict[str, Any]) -> Table:
    """How the training of each entry's fresh seeds ended, or that of its best trial if no seed has finished."""
    names, rows = display_names(report), []
    for label in report["order"]:
        runs = runs_shown(by_label(report)[label])
        best = ", ".join(_or(one.get("best_epoch", one.get("epoch")), str) for one in runs)
        epochs = ", ".join(str(one["epochs"]) for one in runs)
        kind = "best trial" if runs and "number" in runs[0] else f"{len(runs)} fresh {plural(len(runs), 'seed')}"
        rows.append([names[label], kind, best, epochs, _how_ended(runs)] if runs else [names[label], *[NOTHING] * 4])
    return Table(["method", "runs", "best epoch", "epochs trained", "how training ended"], rows, list(report["order"]))


def _how_ended(runs: list[dict[str, Any]]) -> str:
    counts = Counter(
        _ended(one).removeprefix(", ") or ("all epochs trained" if one["end"] else NOTHING) for one in runs
    )
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{ended} ({count} of {len(runs)})" for ended, count in counts.items())


def _ended(run: dict[str, Any]) -> str:
    """How the training of a finished run ended, if that is worth a word, as an addition to a phrase."""
    if run["end"] is not None and run["best_is_last"]:
        return ", still improving at the last evaluation"
    if run["end"] == "patience":
        count = run["evaluations_since_best"]
        return f", stopped by patience after {count} {plural(count or 0, 'evaluation')} without improvement"
    return ""


def published(report: dict[str, Any]) -> Table:
    """Published values and ours, metric by metric."""
    entries, names, rows = by_label(report), display_names(report), []
    for row in report["published"]:
        test = entries[row["entry"]]["test"]
        for metric, value in row["metrics"].items():
            ours = _mean(test.get(metric))
            rows.append([names[row["entry"]], metric_name(metric), f"{value:.4f}", ours, row["source"], row["note"]])
    return Table(["method", "metric", "published", "ours, test", "source", "note"], rows)


def versions(report: dict[str, Any]) -> Table:
    """The packages that the runs used."""
    return Table(["package", "version"], [[name, str(version)] for name, version in report["versions"].items()])


def _reads(entry: dict[str, Any]) -> str:
    return {True: "content", False: "IDs only"}.get(entry["reads_content"], NOTHING)


def _difference(report: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    gap = entry["difference"]
    if entry["label"] == report["baseline"]:
        return ["baseline", NOTHING, NOTHING]
    if gap is None:
        return [NOTHING] * 3
    return [
        signed(gap["mean"]),
        f"{signed(gap['low'])} to {signed(gap['high'])}",
        p_value(gap["holm"]).removeprefix("= "),
    ]


def _mean(value: dict[str, Any] | None) -> str:
    if value is None:
        return NOTHING
    return f"{value['mean']:.4f}" + ("" if value["low"] is None else f" ±{value['high'] - value['mean']:.4f}")


def _or(value: Any, told: Any) -> str:
    return NOTHING if value is None else str(told(value))
