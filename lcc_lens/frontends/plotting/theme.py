"""One look for all figures: colours, sizes, the caption under the title."""

from __future__ import annotations

import math
import textwrap
from html import escape

import plotly.graph_objects as go

#: Okabe-Ito colours, told apart by colour-blind readers and in grey print; fixed for the three models everywhere.
COLORS = {"dense": "#0072B2", "pruned": "#D55E00", "restored": "#009E73"}
#: Okabe-Ito colours that stand for no model, for other series, each with a marker of its own.
SERIES = (("#CC79A7", "square"), ("#56B4E9", "diamond"), ("#E69F00", "triangle-up"), ("#4d4d4d", "x"))
#: What kinds of restorations look like.
KINDS = {
    "restored": (COLORS["restored"], "circle"),
    "baseline": SERIES[0],
    "control": ("#7a7a7a", "diamond-open"),
}
#: White to dark, one direction, perceptually even: more is darker.
SEQUENTIAL = "Oranges"
#: The same for ranks, so that a rank is not taken for a size.
RANKS = "Blues"
#: A paper's column (3.5 inches) and page (7.1 inches) at 120 pixels an inch; text then prints at 7 to 8 points.
COLUMN, PAGE = 420, 852

_TEXT, _SMALL = 13, 11
_AXIS = {
    "showline": True, "linecolor": "#4d4d4d", "ticks": "outside", "tickcolor": "#4d4d4d", "ticklen": 4,
    "gridcolor": "#e8e8e8", "zeroline": False, "automargin": True, "title": {"font": {"size": 12}, "standoff": 6},
}  # fmt: skip
_TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "Inter, Helvetica, Arial, Liberation Sans, sans-serif", "size": 12, "color": "#1b1b1b"},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "colorway": [color for color, _ in SERIES],
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"},
    }
)


def styled(
    figure: go.Figure, title: str, caption: str, *, width: int, plot_height: int, above: int = 8, below: int = 52
) -> go.Figure:
    """Give a figure the common look; title and caption are plain text, wrapped to the width.

    Args:
        figure: changed in place.
        title: what it shows.
        caption: on what data, how many, which seeds, what the bars are.
        width: of the whole figure, in pixels (see :data:`COLUMN`).
        plot_height: of the plotting area alone.
        above: room between caption and plot, for a legend or panel titles.
        below: room under the plot, for ticks and their title.
    """
    titles = textwrap.wrap(title, int((width - 20) / 7.0))
    lines = [line for part in caption.split("\n") for line in textwrap.wrap(part, int((width - 20) / 5.4))]
    text = f"<b>{'<br>'.join(map(escape, titles))}</b>"
    for line in lines:
        text += f'<br><span style="font-size:{_SMALL}px;color:#555">{escape(line)}</span>'
    top = 16 + round(1.3 * _TEXT * (len(titles) + len(lines))) + above
    figure.update_layout(
        template=_TEMPLATE,
        title={
            "text": text, "font": {"size": _TEXT}, "x": 0, "xanchor": "left", "y": 1, "yanchor": "top",
            "pad": {"t": 24, "l": 10},
        },
        margin={"l": 54, "r": 14, "t": top, "b": below},
        width=width,
        height=top + plot_height + below,
    )  # fmt: skip
    return figure


def rounded(value: float | None, digits: int = 5) -> float | None:
    """A number with so many significant digits: figures of the same data are then the same text everywhere."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")
