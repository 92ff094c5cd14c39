"""What the report holds about one run of a sweep: a trial of the search, or a winner's run with a fresh seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from distrec.tuning.report.reading import Reader

_ABSENT = object()
STATUSES = ("waiting", "running", "done", "stopped", "failed")


def trial(reader: Reader, name: str, record: dict[str, Any], metric: str) -> dict[str, Any]:
    """A trial of the search. Its `value` is the best validation `metric` so far, or None if none was measured.

    A method without epochs has no learning curve; its value is the finished run's.
    """
    epochs = reader.epochs("trials", name, "metrics.jsonl")
    summary = reader.mapping("trials", name, "summary.json")
    curve = [
        [epoch["epoch"], value]
        for epoch in epochs
        if (value := number((epoch.get("valid") or {}).get(metric))) is not None
    ]
    best = max(curve, key=lambda point: point[1]) if curve else None
    value = best[1] if best else number((summary.get("valid") or {}).get(metric))
    status = record.get("status") if record.get("status") in STATUSES else "waiting"
    return {
        "id": name,
        "number": record.get("number", 0),
        "values": record.get("values", {}),
        "parent": record.get("parent"),
        "born": record.get("born", 0),
        "replaced": status == "stopped" and record.get("pause") is not None,
        "status": status,
        "finished": status in ("done", "stopped") and value is not None,
        "reason": record.get("reason"),
        "failures": record.get("failures", 0),
        "value": value,
        "epoch": best[0] if best else None,
        "epochs": len(epochs),
        "curve": curve,
        **_ending(summary if status == "done" else {}, curve),
        **_cost(reader, "trials", name, record, epochs, summary),
    }


def fill_values(reader: Reader, trials: list[dict[str, Any]]) -> None:
    """Give every trial of an entry a value for each parameter that any of them names.

    A trial of the unchanged base config names none; its values are read from its run config.
    """
    names = {name for one in trials for name in one["values"]}
    for one in trials:
        lacking = names - one["values"].keys()
        config = reader.yaml("trials", one["id"], "config.yaml") if lacking else {}
        for name in lacking:
            node: Any = config
            for part in name.split("."):
                node = node.get(part, _ABSENT) if isinstance(node, dict) else _ABSENT
            if node is not _ABSENT:
                one["values"][name] = node


def fresh_seed(reader: Reader, name: str, record: dict[str, Any]) -> dict[str, Any]:
    """A winner's run with a fresh seed. `test` is None until the run has finished."""
    epochs = reader.epochs("final", name, "metrics.jsonl")
    summary = reader.mapping("final", name, "summary.json")
    valid, test = _metrics(summary.get("valid")), _metrics(summary.get("test"))
    return {
        "run": name,
        "seed": record.get("seed"),
        "status": record.get("status") if record.get("status") in STATUSES else "waiting",
        "reason": record.get("reason"),
        "valid": valid,
        "test": test,
        "users": summary.get("users", {}),
        "best_epoch": summary.get("best_epoch"),
        "epochs": len(epochs),
        **_ending(summary, []),
        **_cost(reader, "final", name, record, epochs, summary),
    }


def example_users(reader: Reader, run: str) -> list[dict[str, Any]]:
    """The users in the examples of a winner's run; empty if the file is absent or unreadable.

    Each has `user`, `id`, and lists of items `history`, `held_out` and `recommended`; an item has `item` (index), `id`
    and `title` (None if it has none).
    """
    parts = ("final", run, "evaluation", "test-examples.json")
    try:
        return [
            {
                "user": int(row["user"]),
                "id": str(row["id"]),
                **{
                    key: [
                        {"item": int(item["item"]), "id": str(item["id"]), "title": item["title"]} for item in row[key]
                    ]
                    for key in ("history", "held_out", "recommended")
                },
            }
            for row in reader.mapping(*parts).get("users", [])
        ]
    except (KeyError, TypeError, ValueError):
        reader.unreadable.append("/".join(parts))
        return []


def number(value: float | None) -> float | None:
    """`value` as a float if it is finite, else None."""
    if value is not None:
        with suppress(OverflowError):  # an integer beyond the largest float
            return float(value) if math.isfinite(value) else None
    return None


def _metrics(value: Mapping[str, float | None] | None) -> dict[str, float] | None:
    return {name: found for name, entry in (value or {}).items() if (found := number(entry)) is not None} or None


def _ending(summary: dict[str, Any], curve: list[list[Any]]) -> dict[str, Any]:
    """How a run's training ended: `end`, `best_is_last` and `evaluations_since_best`, as in `summary.json`.

    A run that has not finished has no `end`, and its curve says whether the best evaluation is the last one so far. (A
    trial of a population has a summary of each pause, which is no end.)
    """
    best = max(curve, key=lambda point: point[1]) if curve else None
    return {
        "end": summary.get("end") if summary.get("end") in ("epochs", "patience") else None,
        "best_is_last": summary.get("best_is_last", best is not None and best == curve[-1]) is True,
        "evaluations_since_best": summary.get("evaluations_since_best"),
    }


def _cost(
    reader: Reader,
    kind: str,
    name: str,
    record: dict[str, Any],
    epochs: list[dict[str, Any]],
    summary: dict[str, Any],
) -> dict[str, Any]:
    """Seconds over all attempts, CPU hours reserved, training seconds per epoch and a worker's peak memory in bytes."""
    run = reader.mapping(kind, name, "run.json")
    seconds, cpus = number(record.get("seconds")), number(record.get("cpus"))
    trained = [took for epoch in epochs if (took := number((epoch.get("seconds") or {}).get("train"))) is not None]
    peaks = [number(epoch.get("peak_memory_bytes")) for epoch in [*epochs, summary]]
    return {
        "started": next((attempt["started"] for attempt in run.get("attempts", []) if attempt.get("started")), None),
        "seconds": seconds,
        "cpu_hours": None if seconds is None or cpus is None else seconds * cpus / 3600,
        "seconds_per_epoch": sum(trained) / len(trained) if trained else None,
        "peak_memory_bytes": max((peak for peak in peaks if peak is not None), default=None),
        "degradations": run.get("degradations", []),
        "versions": run.get("versions", {}),
    }
