"""The report as Markdown: the sentences and tables of the page, without plots and pictures."""

from __future__ import annotations

from typing import Any

from distrec.tuning.report import words
from distrec.tuning.report.pictures import Items
from distrec.tuning.report.sections import Section
from distrec.tuning.report.tables import Table


def render(report: dict[str, Any], sections: list[Section], missing: list[str], items: Items) -> str:
    """The content of `report.md`."""
    lines = [f"# Sweep {report['sweep']['name']}", "", *_paragraphs([*words.opening(report), *words.answer(report)])]
    for section in sections:
        if section.plots and not section.tables:
            continue  # Markdown shows no plots
        lines += _section(report, section, items, "##")
    if missing:
        lines += ["## What is missing", "", *(f"- {line}" for line in missing), ""]
    return "\n".join(lines).rstrip() + "\n"


def table(shown: Table, choice: str | None = None) -> list[str]:
    """The lines of a table, with all columns but the first aligned right. The row of the entry `choice` is bold."""
    align = ["---", *["--:"] * (len(shown.head) - 1)]
    bold = [shown.labels[place] == choice if shown.labels else False for place in range(len(shown.rows))]
    rows = [[f"**{cell}**" for cell in row] if strong else row for row, strong in zip(shown.rows, bold)]
    return [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in (shown.head, align, *rows)] + [""]


def _section(report: dict[str, Any], section: Section, items: Items, mark: str) -> list[str]:
    lines = [f"{mark} {section.title}", "", *_paragraphs(section.words)]
    if section.kind == "configs":
        lines += _configs(report)
    if section.kind == "examples":
        lines += _examples(report, items)
    for shown in section.tables:
        lines += table(shown, report["choice"])
    lines += _paragraphs(section.after)
    for inner in section.sections:
        lines += _section(report, inner, items, mark + "#")
    return lines


def _configs(report: dict[str, Any]) -> list[str]:
    names = words.display_names(report)
    rows = [
        [names[entry["label"]], f"`{entry['config']['path']}`", f"`{words.command(report, entry)}`"]
        for entry in report["entries"]
        if entry["config"]
    ]
    return table(Table(["method", "file", "command"], rows))


def _examples(report: dict[str, Any], items: Items) -> list[str]:
    names, lines = words.display_names(report), [items.note, ""] if items.note else []

    def told(chosen: list[int], held_out: list[int]) -> str:
        titles = (items.titles.get(item, f"item {item}") for item in chosen)
        return "; ".join(f"**{title}**" if item in held_out else title for item, title in zip(chosen, titles))

    for user in report["examples"]:
        rows = [["history", told(user["history"], [])], ["held out", told(user["held_out"], [])]]
        rows += [[names[label], told(chosen, user["held_out"])] for label, chosen in user["recommended"].items()]
        lines += [f"User {user['id']}", "", *table(Table(["", "items"], rows))]
    return lines


def _paragraphs(sentences: list[str]) -> list[str]:
    return [line for sentence in sentences for line in (sentence, "")]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
