"""Parallel coordinates of a method's trials: one axis for each varied parameter, drawn with ordinary SVG lines.

Axes are placed one below the other, so that names and values can be read on a narrow screen too. Plotly's own trace
for parallel coordinates needs WebGL.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from distrec.tuning.report.plots import FAINT, PAPER, Style, figure_of
from distrec.tuning.report.statistics import is_number
from distrec.tuning.report.words import metric_name

FEWEST_PARAMETERS, FEWEST_TRIALS = 2, 3
_MOST_TICKS = 5
_ON_LINES: dict[str, Any] = {"bgcolor": PAPER, "opacity": 0.85, "borderpad": 1}  # for text that lines cross


def parallel_coordinates(report: dict[str, Any], entry: dict[str, Any], style: Style) -> go.Figure | None:
    """Every finished trial as a line from parameter to parameter, down to its best validation value; clones left out.

    Better trials are drawn more opaque, and the best one with a thicker line. With fewer than two varied parameters or
    three trials there is no figure.
    """
    whole = (trial for trial in entry["trials"] if trial["finished"] and trial["parent"] is None)
    trials = sorted(whole, key=lambda trial: trial["value"])
    names = varied(trials)
    if len(names) < FEWEST_PARAMETERS or len(trials) < FEWEST_TRIALS:
        return None
    metric = metric_name(report["sweep"]["metric"])
    columns = [(name, [trial["values"].get(name) for trial in trials]) for name in names]
    columns.append((f"validation {metric}", [trial["value"] for trial in trials]))
    figure = figure_of("", "", 60 + 74 * len(columns))
    figure.update_xaxes(visible=False, range=[-0.03, 1.03])
    figure.update_yaxes(visible=False, range=[0.6 - len(columns), 0.5])
    places = []
    for row, (name, values) in enumerate(columns):
        positions, ticks = axis(values, by_size=row == len(columns) - 1)
        places.append(positions)
        figure.add_shape(type="line", x0=0, x1=1, y0=-row, y1=-row, line={"color": FAINT, "width": 2}, layer="below")
        figure.add_annotation(
            x=0, y=-row, text=f"<b>{name}</b>", xanchor="left", yanchor="bottom", yshift=6, showarrow=False, **_ON_LINES
        )
        for position, text in ticks:
            anchor = "left" if position < 0.08 else "right" if position > 0.92 else "center"
            figure.add_annotation(
                x=position,
                y=-row,
                text=text,
                xanchor=anchor,
                yanchor="top",
                yshift=-3,
                showarrow=False,
                font={"size": 11},
                **_ON_LINES,
            )
    for place, trial in enumerate(trials):
        best = place == len(trials) - 1
        told = "<br>".join(f"{name} {short(values[place])}" for name, values in columns)
        figure.add_scatter(
            x=[positions[place] for positions in places], y=[-row for row in range(len(columns))], mode="lines+markers",
            opacity=1 if best else 0.2 + 0.5 * place / len(trials), name=f"trial {trial['number']}",
            line=style.line(entry["label"], 4 if best else 2, dash="solid"),
            marker=style.marker(entry["label"], 9 if best else 6),
            hovertemplate=f"trial {trial['number']}<br>{told}<extra></extra>",
        )  # fmt: skip
    return figure


def varied(trials: Sequence[dict[str, Any]]) -> list[str]:
    """The parameters that have more than one value among the trials."""
    names = sorted({name for trial in trials for name in trial["values"]})
    return [name for name in names if len({json.dumps(trial["values"].get(name)) for trial in trials}) > 1]


def axis(values: Sequence[Any], by_size: bool = False) -> tuple[list[float], list[tuple[float, str]]]:
    """The position of each value on an axis from 0 to 1, and the axis's ticks as (position, text).

    Numbers are placed by their logarithm if the largest is at least 20 times the smallest, otherwise by their size.
    Values that are not numbers, or that have at most five distinct numbers, are placed in even steps. With `by_size`,
    a few distinct numbers are placed by size too.
    """
    keys = [json.dumps(value, sort_keys=True) for value in values]
    distinct = {key: value for key, value in zip(keys, values)}
    numeric = all(is_number(value) for value in values)
    if not numeric or len(distinct) == 1 or (len(distinct) <= _MOST_TICKS and not by_size):
        order = sorted(distinct, key=lambda key: distinct[key]) if numeric else sorted(distinct)
        place = {key: number / max(len(order) - 1, 1) for number, key in enumerate(order)}
        return [place[key] for key in keys], [(place[key], short(distinct[key])) for key in order]
    low, high = min(values), max(values)
    scale = math.log if low > 0 and high / low >= 20 else float
    span = scale(high) - scale(low)
    ends = [(0.0, short(low)), (1.0, short(high))]
    return [(scale(value) - scale(low)) / span for value in values], ends


def short(value: Any) -> str:
    """A value in a few characters."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
