"""The sentences of the report. Each is derived from `report.json`, and left out where its numbers are missing."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from typing import Any

SETTINGS = ("run.name", "train.epochs", "budget.epochs", "changes", "chance alone")
"""What the sentences of the report put in backticks. Other backticks come from the data, and are not markup."""
IN_BACKTICKS = re.compile(f"`({'|'.join(map(re.escape, SETTINGS))})`")
CERTAIN = 0.05  # a corrected p below this level counts as a difference
_NAMES = {"recall": "Recall", "ndcg": "NDCG", "precision": "Precision", "map": "MAP", "hit": "Hit rate"}
_SCHEDULERS = {"asha": "asynchronous successive halving", "pbt": "population-based training"}
_MASKS = {
    "train": "Items of a user's training history are left out of the ranking",
    "train+valid": "Items of a user's training and validation history are left out of the ranking",
    "none": "No item is left out of the ranking",
}


def metric_name(metric: str) -> str:
    """The display name of a metric, such as `Recall@20` for `recall@20`."""
    name, at, k = metric.partition("@")
    return f"{_NAMES.get(name, name)}{at}{k}"


def display_names(report: dict[str, Any]) -> dict[str, str]:
    """The display name of each entry, by label: its title, with the label added where entries share a title."""
    titles = Counter(entry["title"] for entry in report["entries"])
    return {
        entry["label"]: entry["title"] if titles[entry["title"]] == 1 else f"{entry['title']} [{entry['label']}]"
        for entry in report["entries"]
    }


def by_label(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of the report, by label."""
    return {entry["label"]: entry for entry in report["entries"]}


def opening(report: dict[str, Any]) -> list[str]:
    """One sentence about the dataset, and one about the sweep's progress."""
    data, started = report["data"], report["sweep"]["started"]
    known = [f"{data[side]:,} {side}" for side in ("users", "items") if data.get(side) is not None]
    known += [f"{rows:,} {split} interactions" for split, rows in (data.get("interactions") or {}).items()]
    known += [f"split {data['split']}"] if data.get("split") else []
    about = f"Dataset {data.get('name') or data['path']}{': ' if known else ''}{', '.join(known)}."
    return [about + (f" Started {started}." if started else ""), _state(report)]


def _state(report: dict[str, Any]) -> str:
    counts = {
        status: sum(entry["counts"][status] for entry in report["entries"])
        for status in ("done", "stopped", "failed", "running", "waiting")
    }
    counted = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    seeds = sum(bool(seed["test"]) for entry in report["entries"] for seed in entry["seeds"])
    if report["sweep"]["state"] == "done":
        return f"The sweep is complete. Trials: {counted}. Runs with fresh seeds: {seeds}."
    if report["sweep"]["state"] == "finishing":
        return (
            f"The search is over (trials: {counted}), but the winners' runs with fresh seeds are not: {seeds} have "
            "finished. Numbers can still change."
        )
    return (
        f"The search is still running (trials: {counted}). Everything below is based on what has been measured so far."
    )


def answer(report: dict[str, Any]) -> list[str]:
    """Which method is best, how certain that is, and what it cost."""
    entries, names, metric = by_label(report), display_names(report), report["sweep"]["metric"]
    chosen, measure = entries[report["choice"]], metric_name(metric)
    name = names[chosen["label"]]
    if not chosen["test"]:
        best = next(trial for trial in chosen["trials"] if trial["id"] == chosen["best"])
        finished, _ = trial_counts(chosen)
        return [
            f"{name} is ahead so far, with a validation {measure} of {best['value']:.4f} in the best of its {finished} "
            f"finished {plural(finished, 'trial')}.",
            "That number is optimistic, as the best of several always is. No run with a fresh seed has finished, so "
            "there are no test values yet.",
        ]
    value = chosen["test"][metric]
    tested = sum(bool(entry["test"]) for entry in report["entries"])
    among = "" if tested == len(entries) else f" (so far, {tested} of {len(entries)} methods have finished seeds)"
    out = [
        f"{name} has the highest mean validation {measure} over fresh seeds: "
        f"{chosen['valid'][metric]['mean']:.4f}{among}. "
        f"On the test split it reaches {value['mean']:.4f} ({interval(value)})."
    ]
    out += _against_baseline(report, chosen, names)
    following = report["next"]
    if following and following["difference"]:
        gap = following["difference"]
        out.append(
            f"{names[following['label']]} is second on validation. On test, the first minus the second is "
            f"{signed(gap['mean'])} (95 % interval over {gap['users']:,} users: {signed(gap['low'])} to "
            f"{signed(gap['high'])})."
        )
    leader = entries[report["order"][0]]
    if leader["label"] != chosen["label"]:
        out.append(
            f"{names[leader['label']]} has a higher test mean ({leader['test'][metric]['mean']:.4f}). It is not the "
            "choice, because choices are made on validation: a value is too high on the split that it was chosen on."
        )
    return [*out, *_still_improving(report, [chosen["label"]]), _cost(chosen)]


def _against_baseline(report: dict[str, Any], chosen: dict[str, Any], names: dict[str, str]) -> list[str]:
    baseline = report["baseline"]
    if baseline is None:
        return ["There is no measured ID-only baseline to compare with."]
    if baseline == chosen["label"]:
        rivals = sum(bool(entry["reads_content"] and entry["test"]) for entry in report["entries"])
        if not rivals:
            return ["It reads interactions only, and no method that reads texts or pictures has been tested."]
        return [
            f"It reads interactions only. None of the {rivals} methods that read texts or pictures was better on "
            "validation."
        ]
    gap = chosen["difference"]
    if gap is None:
        return [f"Its test values by user are missing, so it cannot be compared with {names[baseline]} user by user."]
    sure = (
        "The choice of users alone is unlikely to explain a difference of this size."
        if gap["holm"] < CERTAIN
        else "That may be chance: with other users of the same kind, the sign might be different."
    )
    return [
        f"Against {names[baseline]}, the best method that reads interactions only, the difference is "
        f"{signed(gap['mean'])} (95 % interval over {gap['users']:,} users: {signed(gap['low'])} to "
        f"{signed(gap['high'])}; corrected p {p_value(gap['holm'])}). {sure}"
    ]


def _cost(entry: dict[str, Any]) -> str:
    cost, out = entry["cost"], []
    tried, _ = trial_counts(entry)
    if cost["search_cpu_hours"] is not None:
        out.append(
            f"its search reserved {hours(cost['search_cpu_hours'])} CPU hours for {tried} finished "
            f"{plural(tried, 'trial')}"
        )
    if cost["final_cpu_hours"] is not None:
        out.append(f"its fresh seeds took {hours(cost['final_cpu_hours'])} CPU hours")
    if cost["seconds_per_epoch"] is not None:
        out.append(f"an epoch takes {seconds(cost['seconds_per_epoch'])} of training")
    if cost["peak_memory_bytes"] is not None:
        out.append(f"a worker needed up to {memory(cost['peak_memory_bytes'])} of memory")
    return f"Cost: {'; '.join(out)}." if out else "Its cost was not measured."


def reading_the_leaderboard(report: dict[str, Any]) -> list[str]:
    """What the leaderboard's numbers mean, and what they do not mean."""
    tried = [trial_counts(entry)[0] for entry in report["entries"]]
    compared = any(entry["difference"] for entry in report["entries"])
    out = [
        f"Rows are in order of the test mean. The bold row, {display_names(report)[report['choice']]}, is the choice: "
        "it has the highest validation mean. The best trial's value is the highest validation value that the search "
        "found, which is optimistic.",
        "± is half the width of a 95 % t interval over seeds. It shows how far the mean would move if training were "
        "repeated with other seeds, not with other users. With two or three seeds the interval is wide; with one seed "
        "there is none.",
    ]
    if compared:
        out.append(
            "The difference to the baseline is computed user by user, after each user's values are averaged over "
            "seeds. Its interval and p show how far it would move with other users of the same kind, not with other "
            "seeds. p comes from a two-sided paired t-test and is corrected by Holm's method for the number of methods "
            "compared. The interval is not corrected."
        )
    if report["baseline"] is not None:
        out.append(
            f"The baseline is {display_names(report)[report['baseline']]}: among the methods that read interactions "
            "only, it has the highest validation mean over its fresh seeds."
        )
    out += _still_improving(report, report["order"])
    if min(tried) != max(tried):
        out.append(
            f"Methods have unequal numbers of finished trials ({min(tried)} to {max(tried)}). All methods share one "
            "budget, and the search drops methods that fall behind. A method with more trials had more chances to find "
            "good settings."
        )
    return out


def runs_shown(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that the report judges an entry by: its finished fresh seeds, or else its best trial."""
    tested = [seed for seed in entry["seeds"] if seed["test"]]
    return tested or [trial for trial in entry["trials"] if trial["id"] == entry["best"]]


def _still_improving(report: dict[str, Any], labels: list[str]) -> list[str]:
    """A sentence that names the entries whose training ended before it was seen to stop improving."""
    names, entries, told = display_names(report), by_label(report), []
    for label in labels:
        runs = runs_shown(entries[label])
        short = sum(run["end"] is not None and run["best_is_last"] for run in runs)
        if short:
            told.append(f"{names[label]} ({short} of {len(runs)} {plural(len(runs), 'run')})")
    if not told:
        return []
    return [
        f"Still improving at the last evaluation: {', '.join(told)}. More epochs (`train.epochs`, `budget.epochs`) may "
        "give higher values."
    ]


def protocol(report: dict[str, Any]) -> list[str]:
    """How choices were made, and how that differs from published programs."""
    sweep = report["sweep"]
    mask = _MASKS.get(sweep["mask"])
    users = [f"{count:,} users on {split}" for split, count in sweep["users"].items()]
    return [
        "Epochs and configurations were chosen on the validation split only. The test split is read once: for the "
        "winners, after the end of the search, with fresh seeds that the search never used.",
        "The published programs pick the winner of their grid on the test split and report that run. Such a number is "
        "too high, and the larger the grid, the higher. Our winners are not picked that way, so expect our numbers to "
        "be lower.",
        *([f"{mask} (mask {sweep['mask']}); all other items are ranked."] if mask else []),
        *([f"Values are means over users: {', '.join(users)}."] if users else []),
    ]


def how_searched(report: dict[str, Any]) -> str:
    """Searcher, scheduler, seed and budget in one line."""
    sweep = report["sweep"]
    budget = ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in (sweep["budget"] or {}).items() if value is not None
    )
    scheduler = (
        "none, so no trial was stopped because others were better"
        if sweep["scheduler"] in (None, "none")
        else _SCHEDULERS.get(sweep["scheduler"], sweep["scheduler"])
    )
    about = f"Searcher: {sweep['searcher']}. Scheduler: {scheduler}. Seed: {sweep['seed']}."
    return f"{about} Budget: {budget}." if budget else about


def command(report: dict[str, Any], entry: dict[str, Any]) -> str:
    """The command that trains the winner of an entry again."""
    if report["sweep"]["local"]:
        return f"distrec train {shlex.quote(report['sweep']['folder'] + '/' + entry['config']['path'])}"
    return f"distrec train {shlex.quote(entry['label'] + '.yaml')}"  # a config is a local file: download it first


def trial_counts(entry: dict[str, Any]) -> tuple[int, int]:
    """The number of finished trials and of all trials. A clone and the trial that it replaced count as one."""
    own = [trial for trial in entry["trials"] if not trial["replaced"]]
    return sum(trial["finished"] for trial in own), len(own)


def plural(count: int, word: str) -> str:
    """`word` in the singular or the plural, as `count` requires."""
    return word if count == 1 else f"{word}s"


def interval(value: dict[str, Any]) -> str:
    """The interval over seeds, in words."""
    if value["low"] is None:
        return "one seed, so there is no interval"
    return f"95 % interval over {value['seeds']} seeds: {value['low']:.4f} to {value['high']:.4f}"


def signed(value: float) -> str:
    """A difference with its sign."""
    return f"{value:+.4f}".replace("-", "−") if round(value, 4) else "0.0000"


def p_value(p: float) -> str:
    """A p value with its relation, such as `= 0.012` or `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def hours(value: float) -> str:
    """CPU hours, to three significant digits."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def seconds(value: float) -> str:
    """A duration of `value` seconds in seconds, minutes or hours."""
    if value < 120:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def memory(value: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{value / 2**20:,.0f} MiB" if value < 2**30 else f"{value / 2**30:.1f} GiB"
