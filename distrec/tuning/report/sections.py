"""The report as a list of sections, which the page and the Markdown file both render.

A section without measured data is left out, and `missing` then holds a line that says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go

from distrec.tuning.report import plots, tables, words
from distrec.tuning.report.parallel import parallel_coordinates
from distrec.tuning.report.statistics import FEWEST_TRIALS
from distrec.tuning.report.tables import Table


@dataclass(frozen=True)
class Plot:
    """A figure, its id in the page and its caption."""

    name: str
    caption: str
    figure: go.Figure
    legend: tuple[str, ...] = ()  # labels of the entries drawn, where the figure does not name them itself


@dataclass
class Section:
    """Sentences, then figures, then tables, then sentences that explain them, then inner sections.

    `kind` adds content that is rendered in its own way: `configs` (the winners' files) or `examples` (users and items).
    """

    name: str
    title: str
    words: list[str] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    kind: str = "plain"


def sections(report: dict[str, Any]) -> tuple[list[Section], list[str]]:
    """All sections that have data, and a sentence for each thing that is missing."""
    style = plots.Style(report)
    made = [
        _leaderboard(report, style),
        Section("choices", "How choices were made", [*words.protocol(report), words.how_searched(report)]),
        _configs(report),
        _cost(report, style),
        _slices(report, style),
        _examples(report),
        _published(report),
        _curves(report, style),
        _search(report, style),
        _conditions(report),
    ]
    return [section for section in made if section is not None], missing(report)


def missing(report: dict[str, Any]) -> list[str]:
    """One line for each thing that this report lacks, with the reason."""
    entries, names = report["entries"], words.display_names(report)
    out = []

    def tell(absent: list[str], what: str) -> None:
        if absent:
            out.append(f"{', '.join(absent)}: {what}.")

    tell([names[entry["label"]] for entry in entries if not entry["best"]], "no finished trial")
    if report["sweep"]["state"] == "searching":
        out.append("Test values, slices, recommendations and winners' configs follow when the search is over.")
    else:
        untested = [entry for entry in entries if entry["best"] and not entry["test"]]
        tell([names[entry["label"]] for entry in untested], "no finished run with a fresh seed, so no test values")
        tested = [entry for entry in entries if entry["test"]]
        tell([names[entry["label"]] for entry in tested if not entry["slices"]], "no evaluation by slice")
        alone = [entry for entry in tested if entry["difference"] is None and entry["label"] != report["baseline"]]
        if report["baseline"] is not None:
            tell(
                [names[entry["label"]] for entry in alone],
                "no test values of the users that the baseline ranked, so no difference to the baseline",
            )
        tell(
            [names[entry["label"]] for entry in entries if entry["winner"] and not entry["config"]],
            "the winner's config file is missing",
        )
        if report["left_out"]:
            out.append(f"Left out on request: {', '.join(report['left_out'])}.")
        elif tested and not report["examples"]:
            out.append("No run has written recommendations, so none are shown.")
        if tested and report["baseline"] is None:
            out.append(
                "None of the methods that read interactions only has test values, so there is no difference to a "
                "baseline."
            )
    few = [entry for entry in entries if entry["best"] and _varied(entry) and not entry["importance"]]
    tell(
        [names[entry["label"]] for entry in few],
        f"fewer than {FEWEST_TRIALS} comparable trials, so no parameter importance",
    )
    still = [entry for entry in entries if entry["best"] and not _varied(entry)]
    tell([names[entry["label"]] for entry in still], "all trials had the same settings, so no plots of parameters")
    if not report["published"]:
        out.append("No published value for this dataset and protocol is known.")
    if report["unreadable"]:
        shown, more = report["unreadable"][:5], len(report["unreadable"]) - 5
        out.append(f"Could not be read: {', '.join(shown)}{f' and {more} more' if more > 0 else ''}.")
    return out


def _leaderboard(report: dict[str, Any], style: plots.Style) -> Section:
    metric = words.metric_name(report["sweep"]["metric"])
    figure = plots.leaderboard(report, style)
    if figure is None:
        told = [
            "There are no test values yet. Rows are in order of the best validation value of their trials, which is "
            "optimistic."
        ]
        return Section("leaderboard", "Leaderboard", told, [], [tables.leaderboard(report)])
    caption = (
        f"Test {metric}: mean and 95 % interval over seeds. Rings are single seeds. The dotted line is the baseline's "
        "mean."
    )
    return Section(
        "leaderboard", "Leaderboard", [], [Plot("plot-leaderboard", caption, figure)], [tables.leaderboard(report)],
        words.reading_the_leaderboard(report),
    )  # fmt: skip


def _configs(report: dict[str, Any]) -> Section | None:
    if not any(entry["config"] for entry in report["entries"]):
        return None
    told = [
        "Each file is the complete config of a winner, ready to run. Change `run.name` to keep the new run separate "
        "from the runs of this sweep."
    ]
    return Section("configs", "Configs of the winners", told, kind="configs")


def _cost(report: dict[str, Any], style: plots.Style) -> Section:
    told = [
        "CPU hours are wall-clock hours times the CPUs that a run reserved, whether or not it used them. They include "
        "restarts and failed trials. The time of all runs is their sum, even where runs went in parallel. The time per "
        "epoch is the mean over epochs and covers training only. Peak memory is that of the largest worker process.",
    ]
    took, cpus = report["sweep"]["search_seconds"], report["sweep"]["cpus"]
    if took is not None:
        where = f" on {cpus:g} CPUs" if cpus is not None else ""
        tries = report["sweep"]["attempts"]
        told.append(
            f"The search took {words.seconds(took)} of wall-clock "
            f"time{where}{f', in {tries} attempts' if tries > 1 else ''}."
        )
    figure = plots.best_so_far(report, style)
    shown = []
    if figure is not None:
        caption = (
            "Highest validation value found so far, over the CPU hours that each method had reserved by then. Each "
            "marker is the end of a trial. Trials that ran at the same time are drawn one after another. The last "
            "value of each line is the best of its trials, so it is optimistic."
        )
        shown = [Plot("plot-best-so-far", caption, figure, _drawn(report, "progress"))]
    return Section("cost", "Cost", told, shown, [tables.cost(report)])


def _curves(report: dict[str, Any], style: plots.Style) -> Section | None:
    figure = plots.learning_curves(report, style)
    if figure is None:
        return None
    told = [
        "An epoch is one pass over the training data. How long it takes differs from method to method; see the table "
        'under "Cost".'
    ]
    curved = tuple(
        entry["label"]
        for entry in report["entries"]
        if any(trial["id"] == entry["best"] and trial["curve"] for trial in entry["trials"])
    )
    caption = (
        "The best trial of each method, evaluated on validation during training. The marker is the best epoch, whose "
        "weights are kept."
    )
    shown = [Plot("plot-curves", caption, figure, curved)]
    return Section("curves", "Learning curves", told, shown, [tables.training(report)])


def _search(report: dict[str, Any], style: plots.Style) -> Section | None:
    inner = [_method(report, entry, style) for entry in report["entries"] if entry["trials"]]
    if not inner:
        return None
    told = ["A trial's value is its best validation value over epochs."]
    if any(entry["counts"]["stopped"] for entry in report["entries"]):
        told[0] += (
            " A trial that the scheduler stopped ran for fewer epochs, so its value is a lower bound on what its "
            "settings could reach."
        )
    if any(trial["parent"] for entry in report["entries"] for trial in entry["trials"]):
        told.append(
            "Population-based training: at some epochs, the weakest trials of a method were replaced by clones of the "
            "strongest, which continue from the strongest trials' weights with changed settings. A clone's row shows "
            "its latest settings. Its curve and value include its donor's epochs; its hours do not. If a winner's "
            "settings changed on the way, its config lists the changes under `changes`, and its fresh seeds repeat "
            "them. Importance and parallel coordinates leave clones out."
        )
    if any(entry["importance"] for entry in report["entries"]):
        told.append(
            "Importance is the share of the variance of the trials' values that one parameter alone explains. It needs "
            f"at least {FEWEST_TRIALS} finished trials. With few trials it is large by chance; `chance alone`, the "
            "tick in the plots, is what a parameter without any effect would get on average. Importance says nothing "
            "about parameters that act together, or about values that were not tried."
        )
    return Section("search", "The search, method by method", told, sections=inner)


def _method(report: dict[str, Any], entry: dict[str, Any], style: plots.Style) -> Section:
    label, name = entry["label"], style.name[entry["label"]]
    finished, begun = words.trial_counts(entry)
    whole = sum(trial["finished"] and trial["parent"] is None for trial in entry["trials"])
    made = [
        (f"plot-trials-{label}",
         f"{name}: all trials. The best one has the strongest line; trials that were stopped early are dotted.",
         plots.trial_curves(report, entry, style)),
        (f"plot-parallel-{label}",
         f"{name}: each line is a finished trial, from its settings down to its value. Stronger lines are better "
         "trials.",
         parallel_coordinates(report, entry, style)),
        (f"plot-importance-{label}",
         f"{name}: share of the variance that a parameter alone explains, over {whole} finished trials. The tick is "
         "what chance alone would give.",
         plots.importance(entry, style)),
    ]  # fmt: skip
    shown = [Plot(plot, caption, figure) for plot, caption, figure in made if figure is not None]
    told = [f"{finished} of {begun} {words.plural(begun, 'trial')} finished."]
    listed = [tables.trials(report, entry), *([tables.importance(entry)] if entry["importance"] else [])]
    return Section(f"method-{label}", name, told, shown, listed)


def _slices(report: dict[str, Any], style: plots.Style) -> Section | None:
    figure = plots.slices(report, style)
    if figure is None:
        return None
    told = [
        "A slice of items counts only the held-out items of that kind, which are still ranked among all items. A slice "
        "of users counts all held-out items of those users. Values are means over seeds, ± half the width of the 95 % "
        "interval over seeds. In a slice of few users, a single user can change the value a lot; that interval does "
        "not show this. Slices without users are left out.",
    ]
    caption = f"Test {words.metric_name(report['sweep']['metric'])} by slice, mean over seeds."
    return Section(
        "slices",
        "Where methods are good or bad",
        told,
        [Plot("plot-slices", caption, figure, _drawn(report, "slices"))],
        tables.slices(report),
    )


def _examples(report: dict[str, Any]) -> Section | None:
    if not report["examples"]:
        return None
    told = [
        "The same few users are shown for every method: the newest items of each user's history, the held-out items, "
        "and the ten items that each winner (its first fresh seed) ranks highest. Recommended items that are among the "
        "held-out ones are framed or bold. A few users are an illustration, not a measurement.",
    ]
    return Section("examples", "What the winners recommend", told, kind="examples")


def _published(report: dict[str, Any]) -> Section | None:
    table = tables.published(report)
    if not table.rows:
        return None
    told = [
        "Only values for this dataset and this protocol are shown. Where the published program picked its winner on "
        "test, its value is too high."
    ]
    return Section("published", "Published values and ours", told, tables=[table])


def _conditions(report: dict[str, Any]) -> Section:
    names = words.display_names(report)
    lines: dict[str, list[str]] = {}
    for entry in report["entries"]:
        for line in entry["degradations"]:
            lines.setdefault(line, []).append(names[entry["label"]])
    told = [
        f"{line[:1].upper()}{line[1:]} ({'all' if len(who) == len(names) else ', '.join(who)})."
        for line, who in lines.items()
    ]
    told = told or ["No run reported a slower or approximate path."]
    return Section(
        "conditions",
        "Slower or approximate paths, and versions",
        told,
        tables=[tables.versions(report)] if report["versions"] else [],
    )


def _drawn(report: dict[str, Any], key: str) -> tuple[str, ...]:
    """Labels of the entries whose value under `key` is not empty."""
    return tuple(entry["label"] for entry in report["entries"] if entry[key])


def _varied(entry: dict[str, Any]) -> bool:
    finished = [trial["values"] for trial in entry["trials"] if trial["finished"]]
    return any(values != finished[0] for values in finished)
