"""The figures of the report, as Plotly figures with SVG traces only.

Each entry has the same colour, marker and dash in every figure. The nine colours can be told apart with normal vision
and with protanopia, deuteranopia or tritanopia: any two are at a CIE76 distance of at least 20 in the simulation of
Machado et al. (2009). Their contrast with the page is at least 3. `DARK` maps each colour to its counterpart on a dark
page; the page's script makes the exchange.
"""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from distrec.tuning.report.words import display_names, metric_name

LIGHT_COLOURS = (
    "#0298FD", "#BA7A00", "#028853", "#B90EAF", "#614405", "#0055F4", "#100066", "#551122", "#545F6B",
)  # fmt: skip
DARK_COLOURS = (
    "#ADCBF5", "#FAE78C", "#A3FFEF", "#CB34B9", "#FF720B", "#63A2FF", "#7C4DFF", "#FFA5A3", "#767F89",
)  # fmt: skip
INK, FAINT, PAPER = "#1A1D21", "#D9DDE2", "#FFFFFF"
DARK = {**dict(zip(LIGHT_COLOURS, DARK_COLOURS)), INK: "#E8EAED", FAINT: "#3A4049", PAPER: "#15181D"}
_MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star", "triangle-down", "cross", "hexagon")
GLYPHS = ("●", "■", "◆", "▲", "✖", "★", "▼", "✚", "⬢")
"""The markers as text, for legends and tables of the page."""
_WIDE = 30  # costs that differ by this factor are shown on a logarithmic axis
_DASHES = ("solid", "dash", "dashdot", "longdash")


class Style:
    """The colour, marker, dash and display name of each entry of a report."""

    def __init__(self, report: dict[str, Any]):
        self.place = {entry["label"]: place for place, entry in enumerate(report["entries"])}
        self.name = display_names(report)

    def colour(self, label: str) -> str:
        return LIGHT_COLOURS[self.place[label] % len(LIGHT_COLOURS)]

    def marker(self, label: str, size: int = 9, **more: Any) -> dict[str, Any]:
        symbol = _MARKERS[self.place[label] % len(_MARKERS)]
        return {"symbol": symbol, "size": size, "color": self.colour(label), **more}

    def line(self, label: str, width: float = 2, **more: Any) -> dict[str, Any]:
        dash = _DASHES[self.place[label] // len(LIGHT_COLOURS) % len(_DASHES)]
        return {"color": self.colour(label), "width": width, "dash": dash, **more}


def leaderboard(report: dict[str, Any], style: Style) -> go.Figure | None:
    """The test metric of every entry: mean and interval over seeds, and each seed as a small ring."""
    metric = report["sweep"]["metric"]
    entries = {entry["label"]: entry for entry in report["entries"] if metric in entry["test"]}
    if not entries:
        return None
    figure = figure_of(f"test {metric_name(metric)}", "", 90 + 36 * len(entries))
    shown = [label for label in report["order"] if label in entries]
    for label in shown:
        value, name = entries[label]["test"][metric], style.name[label]
        half = None if value["low"] is None else value["high"] - value["mean"]
        seeds = [seed["test"][metric] for seed in entries[label]["seeds"] if seed["test"] and metric in seed["test"]]
        figure.add_scatter(
            x=seeds, y=[name] * len(seeds), mode="markers",
            marker={"symbol": "circle-open", "size": 7, "color": style.colour(label)},
            hovertemplate="one seed: %{x:.4f}<extra>" + name + "</extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=[value["mean"]], y=[name], mode="markers", marker=style.marker(label, 11),
            error_x=None
            if half is None
            else {"array": [half], "thickness": 2, "width": 6, "color": style.colour(label)},
            hovertemplate="mean %{x:.4f}<extra>" + name + "</extra>",
        )  # fmt: skip
    figure.update_yaxes(categoryorder="array", categoryarray=[style.name[label] for label in reversed(shown)])
    figure.update_yaxes(showgrid=False)
    if report["baseline"] in entries:
        figure.add_vline(
            x=entries[report["baseline"]]["test"][metric]["mean"], line={"color": INK, "width": 1, "dash": "dot"}
        )
    return figure


def learning_curves(report: dict[str, Any], style: Style) -> go.Figure | None:
    """The validation metric by epoch of every entry's best trial."""
    figure = figure_of("epoch", f"validation {metric_name(report['sweep']['metric'])}", 400)
    for entry in report["entries"]:
        for trial in entry["trials"]:
            if trial["id"] == entry["best"] and trial["curve"]:
                _curve(
                    figure,
                    trial,
                    style.name[entry["label"]],
                    style.line(entry["label"], 2.5),
                    style.marker(entry["label"], 11),
                )
    return _if_drawn(figure)


def trial_curves(report: dict[str, Any], entry: dict[str, Any], style: Style) -> go.Figure | None:
    """All trials of one entry: the best one with a thick line, those that the scheduler stopped dotted."""
    figure = figure_of("epoch", f"validation {metric_name(report['sweep']['metric'])}", 320)
    label = entry["label"]
    for trial in sorted(entry["trials"], key=lambda trial: trial["id"] == entry["best"]):
        if trial["curve"]:
            best = trial["id"] == entry["best"]
            line = style.line(label, 3 if best else 1.3, dash="dot" if trial["status"] == "stopped" else "solid")
            marker = style.marker(label, 11 if best else 6)
            _curve(figure, trial, f"trial {trial['number']}", line, marker, opacity=1 if best else 0.55)
    return _if_drawn(figure)


def best_so_far(report: dict[str, Any], style: Style) -> go.Figure | None:
    """The highest validation value found so far, over the CPU hours that the entry's trials had reserved by then."""
    figure = figure_of("reserved CPU hours", f"best validation {metric_name(report['sweep']['metric'])}", 400)
    for entry in report["entries"]:
        if entry["progress"]:
            hours, values = zip(*entry["progress"])
            figure.add_scatter(
                x=hours, y=values, name=style.name[entry["label"]], mode="lines+markers",
                line=style.line(entry["label"], shape="hv"), marker=style.marker(entry["label"], 8),
                hovertemplate="%{y:.4f} after %{x:.3g} CPU hours",
            )  # fmt: skip
    spent = [hours for entry in report["entries"] for hours, _ in entry["progress"] if hours > 0]
    if spent and max(spent) / min(spent) >= _WIDE:
        figure.update_xaxes(type="log", dtick=1, title={"text": "reserved CPU hours (logarithmic)"})
    else:
        figure.update_xaxes(rangemode="tozero")
    return _if_drawn(figure)


def slices(report: dict[str, Any], style: Style) -> go.Figure | None:
    """The test metric in each part of the test split."""
    metric = report["sweep"]["metric"]
    names = list(dict.fromkeys(name for entry in report["entries"] for name in entry["slices"]))
    measured = [entry for entry in report["entries"] if entry["slices"]]
    if not names:
        return None
    figure = figure_of(f"test {metric_name(metric)}", "", 90 + 60 * len(names))
    for place, entry in enumerate(measured):
        shift = 0.6 * ((place + 0.5) / len(measured) - 0.5)  # side by side around the slice's line
        rows = [
            (row, entry["slices"][name]["metrics"][metric]["mean"], name)
            for row, name in enumerate(names)
            if name in entry["slices"]
        ]
        figure.add_scatter(
            x=[value for _, value, _ in rows], y=[row + shift for row, _, _ in rows], mode="markers",
            name=style.name[entry["label"]], marker=style.marker(entry["label"], 9),
            text=[name for _, _, name in rows], hovertemplate="%{text}: %{x:.4f}",
        )  # fmt: skip
    users = {name: entry["slices"][name]["users"] for entry in measured for name in entry["slices"]}
    told = [f"{name}<br>{users[name]:,} users" for name in names]
    figure.update_yaxes(
        tickvals=list(range(len(names))), ticktext=told, range=[len(names) - 0.4, -0.6], showgrid=True, zeroline=False
    )
    figure.update_xaxes(rangemode="tozero")
    return figure


def importance(entry: dict[str, Any], style: Style) -> go.Figure | None:
    """The share of the trials' variance that each parameter alone explains, and what chance alone would give."""
    rows = entry["importance"][::-1]
    if not rows:
        return None
    figure = figure_of("share of the variance", "", 95 + 34 * len(rows))
    names = [row["parameter"] for row in rows]
    figure.add_bar(
        x=[row["share"] for row in rows], y=names, orientation="h", name="share", width=0.55,
        marker={"color": style.colour(entry["label"])}, hovertemplate="%{x:.2f}<extra>%{y}</extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[row["chance"] for row in rows], y=names, mode="markers", name="chance alone, on average",
        marker={"symbol": "line-ns-open", "size": 16, "color": INK, "line": {"width": 2, "color": INK}},
        hovertemplate="chance: %{x:.2f}<extra>%{y}</extra>",
    )  # fmt: skip
    figure.update_xaxes(range=[0, 1.02])
    figure.update_yaxes(showgrid=False)
    return figure


def _curve(
    figure: go.Figure,
    trial: dict[str, Any],
    name: str,
    line: dict[str, Any],
    marker: dict[str, Any],
    opacity: float = 1,
) -> None:
    """Add a learning curve with a marker at its best epoch; a curve of one point is only that marker."""
    epochs, values = zip(*trial["curve"])
    size = [marker["size"] if epoch == trial["epoch"] else 0 for epoch in epochs]
    figure.add_scatter(
        x=epochs, y=values, name=name, mode="lines+markers", line=line, opacity=opacity,
        marker={**marker, "size": size}, hovertemplate="epoch %{x}: %{y:.4f}",
    )  # fmt: skip


def figure_of(x: str, y: str, height: int) -> go.Figure:
    """An empty figure in the page's style, with the titles of its axes and its height in pixels.

    Its background is transparent, so that the page's colour shows through.
    """
    figure = go.Figure(layout={"template": go.layout.Template()})
    figure.update_layout(
        height=height,
        margin={"l": 8, "r": 12, "t": 12, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": INK, "size": 13, "family": "system-ui, sans-serif"},
        hoverlabel={"bgcolor": PAPER, "font": {"color": INK}},
        showlegend=False,  # the page has its own legend, which fits any screen
        dragmode=False,  # a finger that moves over a plot scrolls the page
    )
    axis = {"gridcolor": FAINT, "linecolor": FAINT, "zerolinecolor": FAINT, "automargin": True, "fixedrange": True}
    figure.update_xaxes(title={"text": x}, **axis)
    figure.update_yaxes(title={"text": y}, **axis)
    return figure


def _if_drawn(figure: go.Figure) -> go.Figure | None:
    return figure if figure.data else None
