"""Forest plots: rows with estimates and their intervals, in panels side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lcc_lens.frontends.plotting.theme import COLORS, PAGE, error_bars, rounded, styled

_DODGE = 0.2  # rows between the marks of one row


@dataclass(frozen=True)
class Mark:
    """One estimate, its interval if it has one, and its kind, which sets colour and marker."""

    value: float | None
    kind: str
    interval: tuple[float | None, float | None] | None = None
    note: str = ""


@dataclass(frozen=True)
class Panel:
    """One quantity: a title with its unit, the marks of every row, and reference lines."""

    title: str
    rows: Sequence[Sequence[Mark]]
    references: Mapping[str, float | None] = field(default_factory=dict)
    is_log: bool = False


def forest(
    labels: Sequence[str], panels: Sequence[Panel], looks: Mapping[str, tuple[str, str]], *, title: str, caption: str,
    plot_height: int, below: int = 62, legend: bool | None = None,
) -> go.Figure:  # fmt: skip
    """Draw panels side by side over the same rows, the first row at the top.

    Args:
        looks: colour and marker of every kind, in the legend's order.
        title: see :func:`~lcc_lens.frontends.plotting.theme.styled`, as for the rest.
        caption: see there.
        plot_height: see there.
        below: see there.
        legend: see there.
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
            title=panel.title, type="log" if panel.is_log else "linear", range=_range(panel), col=column,
            nticks=4 if len(panels) > 4 else None,
        )  # fmt: skip
    figure.update_yaxes(range=[len(labels) - 0.45, -0.55], showgrid=False)
    figure.update_yaxes(tickvals=list(range(len(labels))), ticktext=list(labels), ticks="", col=1)
    figure.update_yaxes(ticks="", showline=False)
    for row in range(1, len(labels), 2):
        figure.add_hrect(y0=row - 0.5, y1=row + 0.5, fillcolor="#f5f5f5", line_width=0, layer="below")
    return styled(figure, title, caption, width=PAGE, plot_height=plot_height, above=30, below=below, legend=legend)


def _reference(name: str, value: float, n_rows: int, show: bool) -> go.Scatter:
    return go.Scatter(
        x=[rounded(value)] * 2, y=[-0.55, n_rows - 0.45], mode="lines", name=name, legendgroup=name, showlegend=show,
        line={"color": COLORS.get(name, "#4d4d4d"), "width": 1.5, "dash": "dash"}, hoverinfo="x+name",
    )  # fmt: skip


def _range(panel: Panel) -> list[float | None]:
    """Range of the panel's values, intervals and references, with a margin."""
    ends = [end for marks in panel.rows for mark in marks for end in (mark.value, *(mark.interval or ()))]
    values = [value for value in (*ends, *panel.references.values()) if value is not None]
    if panel.is_log:
        values = [math.log10(value) for value in values]
    if not values:
        return [0.0, 1.0]
    margin = 0.05 * (max(values) - min(values)) or 0.1 * abs(values[0]) or 1.0
    return [rounded(min(values) - margin), rounded(max(values) + margin)]


def _marks(panel: Panel, labels: Sequence[str], kind: str, color: str, symbol: str) -> go.Scatter:
    values, intervals, y, texts = [], [], [], []
    for row, marks in enumerate(panel.rows):
        for place, mark in enumerate(marks):
            if mark.kind != kind or mark.value is None:
                continue
            values.append(mark.value)
            intervals.append(mark.interval)
            y.append(round(row + _DODGE * (place - (len(marks) - 1) / 2), 3))
            texts.append(f"{labels[row]}: {mark.value:.4g}{mark.note}")
    return go.Scatter(
        x=[rounded(value) for value in values], y=y, mode="markers", name=kind, legendgroup=kind, text=texts,
        marker={"color": color, "symbol": symbol, "size": 7, "line": {"width": 1.2, "color": color}},
        error_x=error_bars(values, intervals, width=1.3), hoverinfo="text+name",
    )  # fmt: skip
