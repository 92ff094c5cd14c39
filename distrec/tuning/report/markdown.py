"""The report as Markdown: the sentences and tables of the page, without plots and pictures.

No text from the data acts as markup: it makes no tag, link, picture, heading, list or table cell.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from distrec.tuning.report import words
from distrec.tuning.report.pictures import Items
from distrec.tuning.report.sections import Section
from distrec.tuning.report.tables import Table

_SPACE = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")
_SPECIAL = re.compile(
    r"[\\*<>&\[\]#$~|`]"
    r"|(?<=\])\("  # of a link
    r"|(?<![^\W_])_|_(?![^\W_])"  # inside a word, as in min_trials, it has no meaning
    r"|(?<=[A-Za-z]):(?=\S)|(?<=www)\.|(?<=\S)@(?=[^\s@]*\.\S)",  # GitHub makes links of addresses
    re.ASCII,
)
_ENTITIES = {character: f"&#{ord(character)};" for character in "$~|`:."}
_ENTITIES |= {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
_ENTITIES["@"] = "@&#8203;"  # a space of no width: an entity in place of the sign would still be part of an address
_START = re.compile(r"(\d{0,9})([-+=.)])")


def render(report: dict[str, Any], sections: list[Section], missing: list[str], items: Items) -> str:
    """The content of `report.md`."""
    lines = [f"# Sweep {escaped(report['sweep']['name'])}", ""]
    lines += _paragraphs([*words.opening(report), *words.answer(report)])
    for section in sections:
        if section.plots and not section.tables:
            continue  # Markdown shows no plots
        lines += _section(report, section, items, "##")
    if missing:
        lines += ["## What is missing", "", *(f"- {_prose(line)}" for line in missing), ""]
    return "\n".join(lines).rstrip() + "\n"


def escaped(text: str) -> str:
    """`text` as Markdown within a line that shows exactly this text, with each run of white space as one space.

    Only an invisible character is added, in mail addresses.
    """
    return _escaped(text).strip()


def code(text: str) -> str:
    """`text` as a code span, inside which nothing is markup, with each run of white space as one space."""
    plain = _SPACE.sub(" ", text).strip()
    fence = "`" * (1 + max(map(len, re.findall("`+", plain)), default=0))
    pad = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{fence}{pad}{plain}{pad}{fence}"


def table(head: list[str], rows: list[list[str]], bold: Sequence[bool] = ()) -> list[str]:
    """The lines of a table of Markdown cells, with all columns but the first aligned right, and some rows bold."""
    align = ["---", *["--:"] * (len(head) - 1)]
    strong = [[f"**{cell}**" if cell else "" for cell in row] if mark else row for row, mark in zip(rows, bold)]
    lines = [head, align, *strong, *rows[len(strong) :]]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines] + [""]


def _section(report: dict[str, Any], section: Section, items: Items, mark: str) -> list[str]:
    lines = [f"{mark} {escaped(section.title)}", "", *_paragraphs(section.words)]
    if section.kind == "configs":
        lines += _configs(report)
    if section.kind == "examples":
        lines += _examples(report, items)
    for shown in section.tables:
        lines += _table(shown, report["choice"])
    lines += _paragraphs(section.after)
    for inner in section.sections:
        lines += _section(report, inner, items, mark + "#")
    return lines


def _table(shown: Table, choice: str) -> list[str]:
    """A table of plain text as Markdown. The row of the entry `choice` is bold."""
    rows = [[escaped(cell) for cell in row] for row in shown.rows]
    return table([escaped(cell) for cell in shown.head], rows, [label == choice for label in shown.labels])


def _configs(report: dict[str, Any]) -> list[str]:
    names = words.display_names(report)
    rows = [
        [escaped(names[entry["label"]]), code(entry["config"]["path"]), code(words.command(report, entry))]
        for entry in report["entries"]
        if entry["config"]
    ]
    return table(["method", "file", "command"], rows)


def _examples(report: dict[str, Any], items: Items) -> list[str]:
    names, lines = words.display_names(report), _paragraphs([items.note] if items.note else [])

    def told(chosen: list[int], held_out: list[int]) -> str:
        titles = (escaped(items.titles[item]) for item in chosen)
        return "; ".join(f"**{title}**" if item in held_out else title for item, title in zip(chosen, titles))

    for user in report["examples"]:
        rows = [["history", told(user["history"], [])], ["held out", told(user["held_out"], [])]]
        rows += [
            [escaped(names[label]), told(chosen, user["held_out"])] for label, chosen in user["recommended"].items()
        ]
        lines += [f"User {escaped(user['id'])}", "", *table(["", "items"], rows)]
    return lines


def _paragraphs(sentences: list[str]) -> list[str]:
    return [line for sentence in sentences for line in (_prose(sentence), "")]


def _prose(text: str) -> str:
    """A line of one sentence of ours: names of settings in backticks are code, everything else is escaped.

    A sentence may begin with a name from the data, so signs and numbers that would begin a list are escaped too.
    """
    out, at = [], 0
    for found in words.IN_BACKTICKS.finditer(text):
        out += [_escaped(text[at : found.start()]), code(found[1])]
        at = found.end()
    line = "".join([*out, _escaped(text[at:])]).strip()
    start = _START.match(line)
    return f"{start[1]}\\{line[start.end(1) :]}" if start else line


def _escaped(text: str) -> str:
    return _SPECIAL.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), _SPACE.sub(" ", text))
