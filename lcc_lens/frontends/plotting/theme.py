"""The style of all figures: colours, sizes, title and caption, error bars."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import plotly.graph_objects as go
from torch import Tensor

#: Okabe-Ito colours of the three models, distinct for colour-blind readers and in grey print.
COLORS = {"dense": "#0072B2", "pruned": "#D55E00", "restored": "#009E73"}
#: Okabe-Ito colours and markers of other series.
SERIES = (("#CC79A7", "square"), ("#56B4E9", "diamond"), ("#E69F00", "triangle-up"), ("#4d4d4d", "x"))
#: Colour and marker of every kind of restoration.
KINDS = {
    "restored": (COLORS["restored"], "circle"),
    "baseline": SERIES[0],
    "control": ("#7a7a7a", "diamond-open"),
}
#: Colour scale of magnitudes, light to dark.
SEQUENTIAL = "Oranges"
#: Colour scale of ranks, another one so that a rank is not read as a magnitude.
RANKS = "Blues"
#: Width of a column (3.5 inches) and a page (7.1 inches) of a paper, at 120 pixels per inch.
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
    figure: go.Figure, title: str, caption: str, *, width: int, plot_height: int, above: int = 8, below: int = 52,
    legend: bool | None = None,
) -> go.Figure:  # fmt: skip
    """Apply the common style in place; title and caption are plain text, wrapped to the width.

    Args:
        caption: data, sample sizes, seeds, and the meaning of the bars.
        width: of the whole figure, in pixels (see :data:`COLUMN`).
        above: pixels between caption and plot, for a legend or panel titles.
        below: pixels under the plot, for ticks and axis titles.
        legend: whether to show a legend; Plotly decides if not given.
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
        showlegend=legend,
    )  # fmt: skip
    return figure


def label_places(
    x: Sequence[float], y: Sequence[float], labels: Sequence[str], *, width: int, height: int
) -> list[str]:
    """Plotly's ``textposition`` of every point's label, so that labels overlap as little as may be.

    Args:
        x, y: the points, as fractions of the plot; ``width``, ``height``: of the plot in pixels.

    Example:
        >>> label_places([0.5, 0.5], [0.5, 0.52], ["this", "that"], width=300, height=300)
        ['top center', 'bottom center']
    """
    taken = [_Box(px * width, py * height, 12.0, 12.0) for px, py in zip(x, y, strict=True)]
    chosen = []
    for px, py, label in zip(x, y, labels, strict=True):
        wide = 6.5 * len(label)
        boxes = {
            place: _Box(px * width + right * (wide / 2 + 8), py * height + up * 14, wide, 14.0)
            for place, (right, up) in _PLACES.items()
        }
        best = min(boxes, key=lambda place: sum(boxes[place].overlap(other) for other in taken))
        taken.append(boxes[best])
        chosen.append(best)
    return chosen


#: Where a label may stand: how far to the right, in half its width, and how far up.
_PLACES = {
    "top center": (0, 1), "bottom center": (0, -1), "middle right": (1, 0), "middle left": (-1, 0),
    "top right": (1, 1), "top left": (-1, 1), "bottom right": (1, -1), "bottom left": (-1, -1),
}  # fmt: skip


@dataclass(frozen=True)
class _Box:
    """A rectangle by its centre and size, in pixels."""

    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: _Box) -> float:
        """The area that both cover."""
        wide = min((self.width + other.width) / 2 - abs(self.x - other.x), self.width, other.width)
        high = min((self.height + other.height) / 2 - abs(self.y - other.y), self.height, other.height)
        return max(wide, 0.0) * max(high, 0.0)


def with_source(figure: go.Figure, source: str) -> go.Figure:
    """Add a first line to the caption of a styled figure, in place: the model, how it was pruned, the seeds."""
    lines = textwrap.wrap(source, int((figure.layout.width - 20) / 5.4))
    title, line_break, rest = figure.layout.title.text.partition("</b>")
    text = "".join(f'<br><span style="font-size:{_SMALL}px;color:#555">{escape(line)}</span>' for line in lines)
    more = round(1.3 * _TEXT * len(lines))
    figure.update_layout(
        title_text=f"{title}{line_break}{text}{rest}", margin_t=figure.layout.margin.t + more,
        height=figure.layout.height + more,
    )  # fmt: skip
    return figure


def rounded(value: float | None, digits: int = 5) -> float | None:
    """A number with so many significant digits, so that equal figures are equal text on every machine."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


def largest_change(relative_loss: Tensor) -> float:
    """The largest relative change, the end of a scale; infinite ones, from no output at all, do not count."""
    finite = relative_loss[relative_loss.isfinite()]
    return max(float(finite.max()), 1e-12) if finite.numel() else 1.0


def error_bars(
    values: Sequence[float], intervals: Sequence[Sequence[float | None] | None], *, scale: float = 1.0, width: float = 1
) -> dict[str, Any]:
    """Plotly's error bars for intervals around values; no bar where an interval or its end is None."""

    def lengths(end: int) -> list[Any]:
        ends = [None if interval is None else interval[end] for interval in intervals]
        return [0 if x is None else rounded(scale * abs(x - value)) for value, x in zip(values, ends, strict=True)]

    bars = {"array": lengths(1), "arrayminus": lengths(0)}
    return {"type": "data", "symmetric": False, "width": 0, "thickness": width, **bars}
