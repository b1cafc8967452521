"""Rows with an estimate and its interval in several panels: the shape of every comparison here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lcc_lens.frontends.plotting.theme import COLORS, rounded

_DODGE = 0.2  # rows between the marks of one row


@dataclass(frozen=True)
class Mark:
    """One estimate: its value, its interval if there is one, and the kind that decides how it looks."""

    value: float | None
    kind: str
    interval: tuple[float | None, float | None] | None = None
    note: str = ""


@dataclass(frozen=True)
class Panel:
    """One quantity over all rows: a title with its unit, each row's marks, and lines at the models' own values."""

    title: str
    rows: Sequence[Sequence[Mark]]
    references: Mapping[str, float | None] = field(default_factory=dict)
    is_log: bool = False


def forest(labels: Sequence[str], panels: Sequence[Panel], looks: Mapping[str, tuple[str, str]]) -> go.Figure:
    """Draw panels side by side over the same rows, the first row on top.

    Args:
        labels: of the rows.
        panels: what is drawn, left to right.
        looks: colour and marker of every kind, in the legend's order.
    """
    labels = [escape(label) for label in labels]
    figure = make_subplots(1, len(panels), shared_yaxes=True, horizontal_spacing=0.035)
    in_legend: set[str] = set()
    for column, panel in enumerate(panels, 1):
        for name, value in panel.references.items():
            if value is not None:
                figure.add_trace(_reference(name, value, len(labels), name not in in_legend), 1, column)
                in_legend.add(name)
        for kind, (color, symbol) in looks.items():
            trace = _marks(panel, labels, kind, color, symbol)
            if trace.x:
                figure.add_trace(trace.update(showlegend=kind not in in_legend), 1, column)
                in_legend.add(kind)
        figure.update_xaxes(
            title=panel.title,
            type="log" if panel.is_log else "linear",
            range=_range(panel),
            col=column,
            nticks=4 if len(panels) > 4 else None,
        )
    figure.update_yaxes(range=[len(labels) - 0.45, -0.55], showgrid=False)
    figure.update_yaxes(tickvals=list(range(len(labels))), ticktext=list(labels), ticks="", col=1)
    figure.update_yaxes(ticks="", showline=False)
    for row in range(1, len(labels), 2):
        figure.add_hrect(y0=row - 0.5, y1=row + 0.5, fillcolor="#f5f5f5", line_width=0, layer="below")
    return figure


def _reference(name: str, value: float, n_rows: int, show: bool) -> go.Scatter:
    return go.Scatter(
        x=[rounded(value)] * 2, y=[-0.55, n_rows - 0.45], mode="lines", name=name, legendgroup=name, showlegend=show,
        line={"color": COLORS.get(name, "#4d4d4d"), "width": 1.5, "dash": "dash"}, hoverinfo="x+name",
    )  # fmt: skip


def _range(panel: Panel) -> list[float | None]:
    """From the smallest to the largest of what is drawn, with a margin."""
    ends = [end for marks in panel.rows for mark in marks for end in (mark.value, *(mark.interval or ()))]
    values = [value for value in (*ends, *panel.references.values()) if value is not None]
    if panel.is_log:
        values = [math.log10(value) for value in values]
    if not values:
        return [0.0, 1.0]
    margin = 0.05 * (max(values) - min(values)) or 0.1 * abs(values[0]) or 1.0
    return [rounded(min(values) - margin), rounded(max(values) + margin)]


def _marks(panel: Panel, labels: Sequence[str], kind: str, color: str, symbol: str) -> go.Scatter:
    x, y, up, down, texts = [], [], [], [], []
    for row, marks in enumerate(panel.rows):
        for place, mark in enumerate(marks):
            if mark.kind != kind or mark.value is None:
                continue
            low, high = mark.interval or (None, None)
            x.append(rounded(mark.value))
            y.append(round(row + _DODGE * (place - (len(marks) - 1) / 2), 3))
            up.append(0 if high is None else rounded(high - mark.value))
            down.append(0 if low is None else rounded(mark.value - low))
            texts.append(f"{labels[row]}: {mark.value:.4g}{mark.note}")
    return go.Scatter(
        x=x, y=y, mode="markers", name=kind, legendgroup=kind, text=texts, hoverinfo="text+name",
        marker={"color": color, "symbol": symbol, "size": 7, "line": {"width": 1.2, "color": color}},
        error_x={"type": "data", "symmetric": False, "array": up, "arrayminus": down, "width": 0, "thickness": 1.3},
    )  # fmt: skip
