"""Turns a sweep folder into `report.json`, the one JSON value that all forms of the report are made from.

```
format       1
sweep        name, folder (the path that the user gave), local, state (searching | finishing | done), metric, searcher,
             scheduler, seed, seeds, budget, resources, mask, users {split: users ranked}, started, attempts,
             search_seconds, cpus
data         name, path, users, items, interactions {split: rows}, split, hash, as far as sweep.json records them
versions     {package: version}
entries      one object for each method of the sweep, in the order of its config:
  label, title, method, reads_content (null: not known)
  trials       id, number, values, parent (the trial that a clone was copied from; null for others), born (the epoch at
               which the clone was copied; its `values` apply from then on), replaced (by a clone), status, finished,
               reason, failures, value (best validation metric), epoch (of `value`), epochs, curve [[epoch, value]],
               end ("epochs" or "patience"; null: not finished, or nothing to train), best_is_last (whether no
               evaluation followed the best one), evaluations_since_best, started, seconds, cpu_hours,
               seconds_per_epoch, peak_memory_bytes
  counts       {status: trials}
  best         id of the finished trial with the highest value; null before there is one
  winner       id of the trial that the sweep chose; null before it has chosen
  progress     [[CPU hours reserved so far, highest value so far]] after each finished trial, in order of starts
  importance   see `statistics.importance`
  seeds        the winner's runs with fresh seeds: run, seed, status, reason, valid {metric: value}, test, users
               {split: users ranked}, best_epoch, epochs, and the keys of trials about the end and the cost
  valid, test  {metric: mean, sd, low, high, seeds} over the finished seeds
  difference   on test, against `baseline`, paired by user: mean, low, high, p, users, holm; null where not measured
  slices       {name: meaning, users, metrics {metric: mean, sd, low, high, seeds}} on test; the same metrics for all
  cost         search_cpu_hours, final_cpu_hours, seconds, seconds_per_epoch, peak_memory_bytes
  config       path (inside the sweep folder) and text of the winner's run config; null before it is written
  degradations [sentence]
baseline     label of the ID-only entry with the highest validation mean over its finished seeds; null if there is none
choice       label of the entry with the highest validation mean over seeds; if no seed has finished, that with the
             highest value of a trial
next         label of the entry that is second on validation, and `difference` on test (choice minus next); null if none
order        labels in the order of the leaderboard: by test mean, then those without test values by their best value
published    entry, source, metrics, note: values that others reported for this dataset and protocol
examples     user, id, history, held_out, recommended {label: items}, as item indices
items        item (index), id, title (null if it has none) of every item in the examples
left_out     what the user asked not to show
unreadable   files that exist but could not be read
```

`winner`, `baseline` and `choice` are chosen on validation. Test values decide only the order of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from distrec.data.storage import Folder, open_folder
from distrec.errors import InputError
from distrec.tuning.report.reading import Reader, read_settings, runs
from distrec.tuning.report.runs import STATUSES, example_users, fill_values, fresh_seed, number, trial
from distrec.tuning.report.statistics import holm, importance, mean_per_user, over_seeds, paired_difference

PerUser = Mapping[str, tuple[np.ndarray, np.ndarray]]
_EXAMPLES = 4  # users whose recommendations are shown


def gather(path: str, examples: bool = True) -> dict[str, Any]:
    """The report of the sweep at `path`; without `examples`, it holds no user's interactions and no item's content.

    Raises:
        InputError: there is no sweep at `path`, or none of its trials has finished.
    """
    folder = open_folder(path)
    settings = read_settings(folder, path)
    reader = Reader(folder)
    state = reader.mapping("sweep.json")
    metric = str(settings.get("metric", "recall@20"))
    entries = _entries(reader, settings, state, metric)
    _require_finished(entries, path)
    per_user = {entry["label"]: found for entry in entries if (found := _per_user(reader, entry, metric)) is not None}
    baseline = _best_by_validation(
        [entry for entry in entries if entry["reads_content"] is False and entry["test"]], metric
    )
    _compare(entries, per_user, baseline)
    choice = _best_by_validation([entry for entry in entries if entry["test"]], metric)
    choice = choice or max((entry for entry in entries if entry["best"]), key=_best_value)["label"]
    users, items = _examples(reader, entries) if examples else ([], [])
    return {
        "format": 1,
        "sweep": {**_sweep(path, folder, settings, state, metric), "users": _users(entries)},
        "data": {"path": settings.get("data"), **(state.get("data") or {})},
        "versions": _versions(state, entries),
        "entries": entries,
        "baseline": baseline,
        "choice": choice,
        "next": _next(entries, choice, per_user, metric),
        "order": _order(entries, metric),
        "published": _published(state, entries),
        "examples": users,
        "items": items,
        "left_out": [] if examples else ["users' histories and recommendations, items' titles and pictures"],
        "unreadable": sorted(set(reader.unreadable)),
    }


def _sweep(path: str, folder: Folder, settings: dict[str, Any], state: dict[str, Any], metric: str) -> dict[str, Any]:
    attempts = state.get("attempts", [])
    return {
        "name": settings["run"].get("name", ""),
        "folder": path.rstrip("/"),
        "local": folder.local,
        "state": "done" if state.get("done") else "finishing" if state.get("closed") else "searching",
        "metric": metric,
        **{key: settings.get(key) for key in ("searcher", "scheduler", "seed", "seeds", "budget", "resources")},
        "mask": settings["evaluate"]["mask"],
        "started": attempts[0].get("started") if attempts else None,
        "attempts": len(attempts),
        "search_seconds": number(state.get("seconds")),
        "cpus": number(state.get("cpus")),
    }


def _entries(reader: Reader, settings: dict[str, Any], state: dict[str, Any], metric: str) -> list[dict[str, Any]]:
    """Every method of the sweep with its trials and seeds; `_compare` sets `difference` afterwards."""
    trials, seeds = runs(reader, "trials"), runs(reader, "final")
    described, winners = state.get("entries", {}), state.get("winners", {})
    out = []
    for label in settings["methods"]:
        about = described.get(label, {})
        mine = [trial(reader, name, record, metric) for name, record in trials if record["entry"] == label]
        mine.sort(key=lambda one: (one["born"], one["number"]))
        fill_values(reader, mine)
        finished = [one for one in mine if one["finished"]]
        whole = [one for one in finished if one["parent"] is None]  # a clone's value depends on its parent too
        fresh = [fresh_seed(reader, name, record) for name, record in seeds if record["entry"] == label]
        fresh.sort(key=lambda one: (one["seed"] is None, one["seed"]))
        tested = [one for one in fresh if one["test"]]
        text = reader.text("winners", f"{label}.yaml")
        out.append(
            {
                "label": label,
                "title": str(about.get("title") or label),
                "method": about.get("method"),
                "reads_content": about.get("reads_content"),
                "trials": [_without(one, "degradations", "versions") for one in mine],
                "counts": {status: sum(one["status"] == status for one in mine) for status in STATUSES},
                "best": max(finished, key=lambda one: one["value"])["id"] if finished else None,
                "winner": winners.get(label),
                "progress": _progress(mine),
                "importance": importance([one["values"] for one in whole], [one["value"] for one in whole]),
                "seeds": [_without(one, "degradations", "versions") for one in fresh],
                "valid": _over_seeds([one["valid"] for one in tested if one["valid"]]),
                "test": _over_seeds([one["test"] for one in tested]),
                "difference": None,
                "slices": _slices(reader, tested, metric),
                "cost": _cost(mine, fresh),
                "config": None if text is None else {"path": f"winners/{label}.yaml", "text": text},
                "degradations": list(dict.fromkeys(line for one in [*mine, *fresh] for line in one["degradations"])),
                "versions": next((one["versions"] for one in [*fresh, *mine] if one["versions"]), {}),
            }
        )
    return out


def _progress(trials: list[dict[str, Any]]) -> list[list[float]]:
    """Cost and best value after each trial, in order of starts; a failed trial adds its cost and no value."""
    spent, best, out = 0.0, float("-inf"), []
    for one in sorted(trials, key=lambda one: (one["started"] or "~", one["number"])):
        if one["cpu_hours"] is None:
            continue
        spent += one["cpu_hours"]
        if one["finished"]:
            best = max(best, one["value"])
            out.append([spent, best])
    return out


def _cost(trials: list[dict[str, Any]], seeds: list[dict[str, Any]]) -> dict[str, Any]:
    def total(runs: list[dict[str, Any]], key: str) -> float | None:
        known = [one[key] for one in runs if one[key] is not None]
        return sum(known) if known else None

    timed = [one["seconds_per_epoch"] for one in seeds if one["seconds_per_epoch"] is not None]
    timed = timed or [one["seconds_per_epoch"] for one in trials if one["seconds_per_epoch"] is not None]
    peaks = [one["peak_memory_bytes"] for one in [*trials, *seeds] if one["peak_memory_bytes"] is not None]
    return {
        "search_cpu_hours": total(trials, "cpu_hours"),
        "final_cpu_hours": total(seeds, "cpu_hours"),
        "seconds": total([*trials, *seeds], "seconds"),
        "seconds_per_epoch": float(np.mean(timed)) if timed else None,
        "peak_memory_bytes": max(peaks, default=None),
    }


def _over_seeds(metrics: list[dict[str, float]]) -> dict[str, Any]:
    names = metrics[0] if metrics else {}
    return {name: over_seeds([one[name] for one in metrics]) for name in names if all(name in one for one in metrics)}


def metrics_shown(metric: str) -> list[str]:
    """The sweep's metric first, then recall, NDCG and hit rate at the same cut-off."""
    _, at, k = metric.partition("@")
    return list(dict.fromkeys([metric, *(f"{kind}{at}{k}" for kind in ("recall", "ndcg", "hit"))]))


def _slices(reader: Reader, seeds: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The metrics in each part of the test split, over the evaluated seeds; parts without users are left out."""
    found = [reader.mapping("final", one["run"], "evaluation", "test.json").get("slices") for one in seeds]
    parts = [part for part in found if part is not None]
    out = {}
    for name, first in parts[0].items() if parts else ():
        measured = {}
        for shown in metrics_shown(metric):
            values = [number(part[name]["metrics"].get(shown)) for part in parts if name in part]
            if known := [value for value in values if value is not None]:
                measured[shown] = over_seeds(known)
        if metric in measured:
            out[name] = {"meaning": first["meaning"], "users": first["users"], "metrics": measured}
    return out


def _users(entries: list[dict[str, Any]]) -> dict[str, int]:
    """The number of users that the splits rank, as the first finished run with a fresh seed recorded it."""
    return next((one["users"] for entry in entries for one in entry["seeds"] if one["users"]), {})


def _per_user(reader: Reader, entry: dict[str, Any], metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Users `[users]` and their test metric `[users]`, averaged over the entry's finished seeds."""
    tested = [one["run"] for one in entry["seeds"] if one["test"]]
    found = [reader.users(metric, "final", run, "evaluation", "test-users.parquet") for run in tested]
    return mean_per_user([one for one in found if one is not None]) if any(one is not None for one in found) else None


def _compare(entries: list[dict[str, Any]], per_user: PerUser, baseline: str | None) -> None:
    """Set `difference` of each entry that can be compared with the baseline; Holm's correction counts only these."""
    if baseline is None or baseline not in per_user:
        return
    others = [entry for entry in entries if entry["label"] != baseline and entry["label"] in per_user]
    for entry in others:
        entry["difference"] = paired_difference(per_user[entry["label"]], per_user[baseline])
    compared = {entry["label"]: entry["difference"]["p"] for entry in others if entry["difference"]}
    for label, p in holm(compared).items():
        next(entry for entry in others if entry["label"] == label)["difference"]["holm"] = p


def _best_by_validation(entries: list[dict[str, Any]], metric: str) -> str | None:
    known = [entry for entry in entries if metric in entry["valid"]]
    return max(known, key=lambda entry: entry["valid"][metric]["mean"])["label"] if known else None


def _next(entries: list[dict[str, Any]], choice: str, per_user: PerUser, metric: str) -> dict[str, Any] | None:
    others = [entry for entry in entries if entry["label"] != choice and entry["test"]]
    label = _best_by_validation(others, metric)
    if label is None or choice not in per_user or label not in per_user:
        return None
    return {"label": label, "difference": paired_difference(per_user[choice], per_user[label])}


def _best_value(entry: dict[str, Any]) -> float:
    return max((one["value"] for one in entry["trials"] if one["finished"]), default=-1.0)


def _order(entries: list[dict[str, Any]], metric: str) -> list[str]:
    def rank(entry: dict[str, Any]) -> tuple[bool, float]:
        tested = metric in entry["test"]
        return not tested, -(entry["test"][metric]["mean"] if tested else _best_value(entry))

    return [entry["label"] for entry in sorted(entries, key=rank)]


def _examples(reader: Reader, entries: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The first few users, each with the recommendations of every winner's run with the lowest seed; their items."""
    users: dict[int, dict[str, Any]] = {}
    items: dict[int, dict[str, Any]] = {}

    def numbers(listed: list[dict[str, Any]]) -> list[int]:
        items.update((item["item"], item) for item in listed)
        return [item["item"] for item in listed]

    for entry in entries:
        shown = (example_users(reader, one["run"]) for one in entry["seeds"] if one["test"])
        for row in next((rows for rows in shown if rows), [])[:_EXAMPLES]:
            about = {"user": row["user"], "id": row["id"]}
            lists = {key: numbers(row[key]) for key in ("history", "held_out")}
            user = users.setdefault(row["user"], {**about, **lists, "recommended": {}})
            user["recommended"][entry["label"]] = numbers(row["recommended"])
    chosen = list(users.values())[:_EXAMPLES]
    named = {item for user in chosen for item in items_of(user)}
    return chosen, [items[item] for item in sorted(named)]


def items_of(user: dict[str, Any]) -> list[int]:
    """Every item in the examples of a user."""
    return [*user["history"], *user["held_out"], *(item for items in user["recommended"].values() for item in items)]


def _published(state: dict[str, Any], entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    labels = {entry["label"] for entry in entries}
    return [
        {
            "entry": row["entry"],
            "source": str(row.get("source") or ""),
            "note": str(row.get("note") or ""),
            "metrics": {name: found for name, value in row.get("metrics", {}).items() if (found := number(value))},
        }
        for row in state.get("published", [])
        if row["entry"] in labels
    ]


def _require_finished(entries: list[dict[str, Any]], path: str) -> None:
    if any(entry["best"] for entry in entries):
        return
    counts = {status: sum(entry["counts"][status] for entry in entries) for status in STATUSES}
    counted = ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "none has started"
    failed = [one for entry in entries for one in entry["trials"] if one["status"] == "failed"]
    why = f"; the first failure: {failed[0]['reason']}" if failed and failed[0]["reason"] else ""
    raise InputError(
        f"sweep '{path}' has no finished trial ({counted}{why}); continue it with 'distrec tune', then run this again."
    )


def _versions(state: dict[str, Any], entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The versions that the sweep recorded, or else its first run; removes them from the entries."""
    own = [entry.pop("versions") for entry in entries]
    return state.get("versions") or next((versions for versions in own if versions), {})


def _without(tree: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key not in keys}
