"""The report as one HTML file that fetches nothing: it contains style, script, plotly.js, figures and pictures."""

from __future__ import annotations

import base64
import json
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from distrec.tuning.report import plots, words
from distrec.tuning.report.pictures import Items
from distrec.tuning.report.sections import Plot, Section


def render(report: dict[str, Any], sections: list[Section], missing: list[str], items: Items) -> str:
    """The content of `report.html`."""
    environment = Environment(loader=FunctionLoader(_template), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["prose"] = _prose
    style = plots.Style(report)
    figures = {plot.name: json.loads(plot.figure.to_json()) for plot in _plots(sections)}
    return environment.get_template("page.html").render(
        Markup=Markup,
        report=report,
        entries=words.by_label(report),
        names=words.display_names(report),
        opening=words.opening(report),
        answer=words.answer(report),
        sections=sections,
        missing=missing,
        items=items,
        titles=items.titles,
        configs=[
            _config(report, entry) for label in report["order"] if (entry := words.by_label(report)[label])["config"]
        ],
        colour={label: place % len(plots.LIGHT_COLOURS) for label, place in style.place.items()},
        glyph={label: plots.GLYPHS[place % len(plots.GLYPHS)] for label, place in style.place.items()},
        light=plots.LIGHT_COLOURS,
        dark=plots.DARK_COLOURS,
        css=Markup(_template("page.css")),
        script=Markup(_template("page.js")),
        plotly=Markup(get_plotlyjs()) if figures else "",
        figures=_json({"figures": figures, "dark": plots.DARK}),
    )


def _config(report: dict[str, Any], entry: dict[str, Any]) -> dict[str, str]:
    """What the page shows of a winner's config: its file, a download link and the command that trains it."""
    text: str = entry["config"]["text"]
    return {
        "label": entry["label"],
        "path": entry["config"]["path"],
        "command": words.command(report, entry),
        "link": f"data:text/yaml;base64,{base64.b64encode(text.encode()).decode()}",
        "text": text,
    }


def _plots(sections: list[Section]) -> list[Plot]:
    return [plot for section in sections for plot in [*section.plots, *_plots(section.sections)]]


def _json(value: Any) -> Markup:
    """JSON that is safe inside a script element."""
    return Markup(json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


def _prose(text: str) -> Markup:
    """A sentence as HTML, with names of settings in backticks as code."""
    return Markup(words.IN_BACKTICKS.sub(r"<code>\1</code>", str(escape(text))))


def _template(name: str) -> str:
    return resources.files(__package__).joinpath(f"template/{name}").read_text(encoding="utf-8")
