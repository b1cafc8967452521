"""Figures of recovery against the number of heads, training examples, tokens or minutes, or the learning rate."""

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
from lcc_lens.frontends.plotting.theme import COLORS, COLUMN, SERIES, error_bars, rounded, styled

Along = Literal["heads", "examples", "tokens", "minutes", "learning rate"]
_AXES = {
    "heads": "heads restored (%)", "examples": "training examples", "tokens": "training tokens (thousands)",
    "minutes": "minutes", "learning rate": "learning rate",
}  # fmt: skip
_TITLES = {
    "heads": "Recovery against the share of heads",
    "examples": "Recovery against training examples",
    "tokens": "Recovery against training tokens",
    "minutes": "Recovery against time",
    "learning rate": "Recovery against the learning rate",
}
#: Colour and marker of up to eight series.
_LOOKS = (
    (COLORS["restored"], "circle"), *SERIES, (COLORS["dense"], "star"), ("#b8860b", "pentagon"), ("#999", "cross"),
)  # fmt: skip
#: Where the axis of minutes has ticks.
_MINUTES = [1, 2, 5, 10, 20, 30, 60, 120, 300]
#: Characters of a name, of which two fit beside each other above the figure.
_TWO_COLUMNS = 25
_ASIDE = 0.35  # percent of heads
#: How to run comparisons that vary each.
_HOW = {
    "heads": "compare with several --heads, each into a run of its own",
    "examples": "compare with several --examples, each into a run of its own",
    "tokens": "compare with several --examples, each into a run of its own",
    "minutes": "restore with several --budget, each into a run of its own",
    "learning rate": "compare lines such as lcc=1e-2 lcc=3e-2 lcc=1e-1",
}


@dataclass(frozen=True)
class Recovery:
    """One point of a series: its x, the recovered share, its interval, and the number of seeds or runs."""

    series: str
    x: float
    share: float
    interval: tuple[float, float] | None
    n: int


def plot_recovery(
    points: Sequence[Recovery], along: Along, caption: str = "", *, measure: str = "log-perplexity recovered"
) -> go.Figure:
    """Recovered share against heads, examples, tokens, minutes or learning rate, one line per series.

    Args:
        points: of :func:`recovery_points`, :func:`domain_points` or :func:`recovery_by_selector`.
        along: the quantity on the x axis.
        caption: data and number of seeds.
        measure: title of the y axis.

    Raises:
        RequestError: no series has two points.
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
        line = sorted((p for p in points if p.series == name), key=lambda p: p.x)
        aside = _ASIDE * (place - (len(series) - 1) / 2)  # so that bars at one x do not hide each other
        figure.add_scatter(
            x=[rounded(100 * p.x + aside if along == "heads" else p.x) for p in line],
            y=[rounded(100 * p.share) for p in line], mode="lines+markers", name=escape(name),
            line={"color": color, "width": 1.6}, marker={"symbol": symbol, "size": 7}, error_y=_bars(line),
        )  # fmt: skip
    is_log = along != "heads"
    rows = -(-len(series) // (2 if max(map(len, series)) <= _TWO_COLUMNS else 1))
    styled(figure, _TITLES[along], caption, width=COLUMN, plot_height=250, above=12 + 18 * rows, legend=True)
    figure.add_hline(y=0, line={"color": COLORS["pruned"], "dash": "dash", "width": 1.2})
    figure.update_xaxes(title=_AXES[along], type="log" if is_log else "linear", exponentformat="power")
    if is_log:
        ticks = _MINUTES if along == "minutes" else sorted({float(f"{p.x:g}") for p in points if p.series in series})
        figure.update_xaxes(tickvals=ticks, ticktext=[f"{x:g}" for x in ticks], tickangle=0)
    else:
        figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(title=f"{measure} (%)")
    return figure


def recovery_points(comparisons: Sequence[Mapping[str, Any]], along: Along) -> list[Recovery]:
    """Points of comparisons: every entry at its setting or learning rate.

    Args:
        comparisons: results of :func:`lcc_lens.evaluation.comparison.compare.compare`, all of one pruned model.
        along: ``heads`` and ``examples`` vary between comparisons, learning rates within each.
    """
    points = []
    for comparison in comparisons:
        for row in summary(dict(comparison)):
            if row["recovered"] is None:
                continue
            if along == "learning rate":
                name, x = row["entry"].partition("=")[0], _learning_rate(comparison, row["entry"])
            else:
                name, x = row["entry"], float(comparison["settings"][along])
            if x is None:
                continue
            ends = row.get("recovered_interval")
            interval = None if ends is None else (ends[0], ends[1])
            points.append(Recovery(entry_label(name), x, row["recovered"], interval, row["seeds"]))
    return points


def domain_points(comparisons: Sequence[Mapping[str, Any]], entries: Mapping[str, str]) -> list[Recovery]:
    """Points of comparisons on text: the mean over kinds of text and the worst kind, by thousands of training tokens.

    Args:
        comparisons: results of :func:`lcc_lens.evaluation.comparison.compare.compare`, all of one pruned model.
        entries: by how an entry begins, its label; of several such entries the one with the best mean counts.
    """
    points = []
    for method, label in entries.items():
        for comparison in comparisons:
            finished = [row for row in summary(dict(comparison)) if row["recovered_mean"] is not None]
            rows = [row for row in finished if row["entry"].partition(":")[0] == method]
            if not rows:
                continue
            row, settings = max(rows, key=lambda row: row["recovered_mean"]), comparison["settings"]
            x = settings["examples"] * settings["max_length"] / 1000
            for name, what in (("mean", "recovered_mean"), ("worst kind", "recovered_worst")):
                spread = row[f"{what}_sd"]
                interval = None if spread is None else (row[what] - spread, row[what] + spread)
                points.append(Recovery(f"{label}, {name}", x, row[what], interval, row["seeds"]))
    return points


def recovery_by_selector(
    study: Mapping[str, Any], model: str, what: Literal["recovered", "kl_removed"] = "recovered"
) -> list[Recovery]:
    """Points of a selector study (``benchmarks/selector_study.json``): every selector at every share of heads.

    Args:
        study: its content.
        model: the pruned model, as the study names it.
        what: log-likelihood recovered, or KL divergence from the dense model removed.
    """
    points = []
    for share, rows in study["summary"][model]["recovery"].items():
        for selector, row in rows.items():
            value = row[what]
            interval = None if value["low"] is None else (value["low"], value["high"])
            points.append(
                Recovery(
                    SELECTOR_LABELS.get(selector, selector),
                    float(share.rstrip("%")) / 100,
                    value["mean"],
                    interval,
                    value["n"],
                )
            )
    return points


def _learning_rate(comparison: Mapping[str, Any], text: str) -> float | None:
    """Learning rate of an entry: the one it names, or the mean of its runs."""
    if Entry.parse(text).lr is not None:
        return Entry.parse(text).lr
    runs = [run for name, run in comparison["cells"].items() if name.rpartition(" | ")[0] == text]
    rates = [run["learning_rates"][0] for run in runs if run.get("learning_rates")]
    return fmean(rates) if rates else None


def _bars(points: Sequence[Recovery]) -> dict[str, Any] | None:
    if all(p.interval is None for p in points):
        return None
    return error_bars([p.share for p in points], [p.interval for p in points], scale=100.0)
