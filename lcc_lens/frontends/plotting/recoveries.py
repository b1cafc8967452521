"""Recovery against one thing that was varied: heads, examples, learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean
from typing import Any, Literal

import plotly.graph_objects as go

from lcc_lens.core.errors import RequestError
from lcc_lens.evaluation.comparison.compare import summary
from lcc_lens.evaluation.comparison.entry import Entry
from lcc_lens.frontends.plotting.labels import SELECTOR_LABELS, entry_label
from lcc_lens.frontends.plotting.theme import COLORS, COLUMN, SERIES, rounded, styled

Along = Literal["heads", "examples", "learning rate"]
_AXES = {"heads": "heads restored (%)", "examples": "training examples", "learning rate": "learning rate"}
_TITLES = {
    "heads": "Recovery against the share of heads",
    "examples": "Recovery against training examples",
    "learning rate": "Recovery against the learning rate",
}
#: One look for each of eight series.
_LOOKS = (
    (COLORS["restored"], "circle"), *SERIES, (COLORS["dense"], "star"), ("#b8860b", "pentagon"), ("#999", "cross"),
)  # fmt: skip
_ASIDE = 0.35  # percent of heads
#: What a comparison is run with to vary each.
_HOW = {
    "heads": "compare with several --heads, each into a run of its own",
    "examples": "compare with several --examples, each into a run of its own",
    "learning rate": "compare lines such as lcc=1e-2 lcc=3e-2 lcc=1e-1",
}


@dataclass(frozen=True)
class Recovery:
    """One point: a line of a comparison or a selector, where it was taken, the share recovered and its interval."""

    series: str
    x: float
    share: float
    interval: tuple[float, float] | None
    n: int


def plot_recovery(
    points: Sequence[Recovery], along: Along, caption: str = "", *, measure: str = "log-perplexity recovered"
) -> go.Figure:
    """Share recovered against heads, examples or learning rate, a line per series.

    Args:
        points: of :func:`recovery_points` or :func:`recovery_by_selector`.
        along: what x is.
        caption: on what data, how many seeds.
        measure: what was recovered.

    Raises:
        RequestError: no series with two points: nothing varies.
    """
    series = [
        name for name in dict.fromkeys(p.series for p in points) if len({p.x for p in points if p.series == name}) > 1
    ]
    if not series:
        raise RequestError(f"expected recovery at two or more values of {along}, got one; {_HOW[along]}")
    if len(series) > len(_LOOKS):
        best = {name: max(p.share for p in points if p.series == name) for name in series}
        series = sorted(series, key=lambda name: -best[name])[: len(_LOOKS)]
        caption = f"{caption} The {len(_LOOKS)} best of {len(best)} series.".strip()
    figure = go.Figure()
    for place, (name, (color, symbol)) in enumerate(zip(series, _LOOKS, strict=False)):
        mine = sorted((p for p in points if p.series == name), key=lambda p: p.x)
        aside = _ASIDE * (place - (len(series) - 1) / 2)  # so that bars at one x do not hide each other
        figure.add_scatter(
            x=[rounded(100 * p.x + aside if along == "heads" else p.x) for p in mine],
            y=[rounded(100 * p.share) for p in mine], mode="lines+markers", name=escape(name),
            line={"color": color, "width": 1.6}, marker={"symbol": symbol, "size": 7}, error_y=_bars(mine),
        )  # fmt: skip
    is_log = along != "heads"
    rows = -(-len(series) // 2)
    styled(figure, _TITLES[along], caption, width=COLUMN, plot_height=250, above=12 + 18 * rows)
    figure.add_hline(y=0, line={"color": COLORS["pruned"], "dash": "dash", "width": 1.2})
    figure.update_layout(showlegend=True)
    figure.update_xaxes(title=_AXES[along], type="log" if is_log else "linear", exponentformat="power")
    if is_log:
        ticks = sorted({p.x for p in points if p.series in series})
        figure.update_xaxes(tickvals=ticks, ticktext=[f"{x:g}" for x in ticks])
    else:
        figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(title=f"{measure} (%)")
    return figure


def recovery_points(comparisons: Sequence[Mapping[str, Any]], along: Along) -> list[Recovery]:
    """Points of comparisons: every line with the settings or the learning rate that it was trained with.

    Args:
        comparisons: what :func:`lcc_lens.evaluation.comparison.compare.compare` returns; of one pruned model, or
            recovery means different things.
        along: ``heads`` and ``examples`` are a comparison's settings; learning rates are told apart within each.
    """
    points = []
    for found in comparisons:
        for row in summary(dict(found)):
            if row["recovered"] is None:
                continue
            if along == "learning rate":
                name, x = row["entry"].partition("=")[0], _learning_rate(found, row["entry"])
            else:
                name, x = row["entry"], float(found["settings"][along])
            if x is None:
                continue
            ends = row.get("recovered_interval")
            interval = None if ends is None else (ends[0], ends[1])
            points.append(Recovery(entry_label(name), x, row["recovered"], interval, row["seeds"]))
    return points


def recovery_by_selector(
    study: Mapping[str, Any], model: str, what: Literal["recovered", "kl_removed"] = "recovered"
) -> list[Recovery]:
    """Points of a selector study (``benchmarks/selector_study.json``): each selector at every share of heads.

    Args:
        study: its content.
        model: the pruned model, as the study names it.
        what: log-likelihood recovered, or divergence from the dense model removed.
    """
    points = []
    for share, rows in study["summary"][model]["recovery"].items():
        for selector, row in rows.items():
            value = row[what]
            interval = None if value["low"] is None else (value["low"], value["high"])
            points.append(
                Recovery(SELECTOR_LABELS[selector], float(share.rstrip("%")) / 100, value["mean"], interval, value["n"])
            )
    return points


def _learning_rate(found: Mapping[str, Any], text: str) -> float | None:
    """What a line was trained at: as it says, or as its cells say where it took its own."""
    if Entry.parse(text).lr is not None:
        return Entry.parse(text).lr
    cells = [cell for name, cell in found["cells"].items() if name.rpartition(" | ")[0] == text]
    rates = [cell["learning_rates"][0] for cell in cells if cell.get("learning_rates")]
    return fmean(rates) if rates else None


def _bars(points: Sequence[Recovery]) -> dict[str, Any] | None:
    if all(p.interval is None for p in points):
        return None
    up = [0.0 if p.interval is None else rounded(100 * (p.interval[1] - p.share)) for p in points]
    down = [0.0 if p.interval is None else rounded(100 * (p.share - p.interval[0])) for p in points]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "width": 0, "thickness": 1}
