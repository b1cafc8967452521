"""Figures of comparisons: recovery, zero-shot accuracy and inference cost of restorations, baselines and controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from lcc_lens.core.errors import RequestError
from lcc_lens.evaluation.comparison.compare import summary
from lcc_lens.frontends.plotting.forest import Mark, Panel, forest
from lcc_lens.frontends.plotting.labels import entry_kind, entry_label
from lcc_lens.frontends.plotting.theme import COLORS, KINDS, PAGE, error_bars, rounded, styled

_ROW = 22  # pixels per row
_ORDER = list(KINDS)
Row = Mapping[str, Any]


def plot_comparison(comparison: Mapping[str, Any]) -> go.Figure:
    """Recovery on other text, KL divergence and response loss of every entry, between dense and pruned.

    Restorations come first, then baselines, then controls, each sorted by recovered share. Controls on the dense model
    have no recovery; they come last, with their losses.

    Args:
        comparison: result of :func:`lcc_lens.evaluation.comparison.compare.compare`, or ``comparison.json``.

    Raises:
        RequestError: no finished run.
    """
    rows, baseline = _rows(comparison), comparison["bare"]
    measures = {"kl": "KL to dense (nats/token)", "response_loss": "response loss (nats/token)"}
    recovered = [[_recovery_mark(row)] for row in rows]
    panels = [Panel("log-perplexity<br>recovered (%)", recovered, {"dense": 100.0, "pruned": 0.0})]
    for key, title in measures.items():
        marks = [[Mark(row[key], entry_kind(row["entry"]), _seed_interval(row, key))] for row in rows]
        references = {name: baseline[name][key] for name in ("dense", "pruned")}
        panels.append(Panel(title.replace(" (", "<br>("), marks, references))
    return _forest(rows, panels, "What restorations recover", _caption(comparison, rows))


def plot_tasks(comparison: Mapping[str, Any]) -> go.Figure:
    """Zero-shot accuracy by task, of restorations, baselines and controls.

    Bars are bootstrap 95 % intervals of the gain over the pruned model on the same items.

    Args:
        comparison: result of :func:`lcc_lens.evaluation.comparison.compare.compare`, or ``comparison.json``.

    Raises:
        RequestError: the comparison measured no task.
    """
    rows, baseline = [row for row in _rows(comparison) if row["tasks"]], comparison["bare"]
    if not rows:
        raise RequestError("expected a comparison with zero-shot tasks, got none; compare with --tasks arc_easy piqa")
    panels = []
    for task, first in rows[0]["tasks"].items():
        before = 100 * baseline["pruned"]["tasks"][task]["acc"]
        marks = []
        for row in rows:
            low, high = (before + 100 * end for end in row["tasks"][task]["gain_interval"])
            marks.append([Mark(100 * row["tasks"][task]["acc"], entry_kind(row["entry"]), (low, high))])
        references = {"dense": 100 * baseline["dense"]["tasks"][task]["acc"], "pruned": before}
        panels.append(Panel(f"{escape(task)}<br>accuracy (%)<br>n = {first['n']}", marks, references))
    caption = (
        f"Bars: 95 % interval of the gain over the pruned model, items drawn anew. {_seeds(rows, 'accuracy_seeds')}"
    )
    return _forest(rows, panels, "Zero-shot accuracy before and after", caption)


def plot_inference_cost(comparison: Mapping[str, Any]) -> go.Figure:
    """Recovery against the time per generated token, and whether pruned weights stay zero.

    Args:
        comparison: result of :func:`lcc_lens.evaluation.comparison.compare.compare`, or ``comparison.json``.

    Raises:
        RequestError: the comparison has no inference times.
    """
    rows = [row for row in _rows(comparison) if row.get("inference") and row["recovered"] is not None]
    if not rows:
        raise RequestError("expected a comparison with inference times, got none; run it again to the end")
    rows.sort(key=lambda row: -row["recovered"])
    figure = go.Figure()
    for kind in reversed(_ORDER):  # restorations are drawn last, on top of controls
        for keeps in (True, False):
            some = [r for r in rows if entry_kind(r["entry"]) == kind and ((r["zeros_kept"] or 1.0) >= 1.0) == keeps]
            if some:
                figure.add_trace(_cost_trace(some, kind, keeps))
    best: dict[float, Row] = {}
    for row in (row for row in rows if entry_kind(row["entry"]) != "control"):
        best.setdefault(row["inference"]["decode_ratio"]["median"], row)
    for top in best.values():  # a name stands behind the end of its bar, where no other bar of its kind lies
        figure.add_annotation(
            x=rounded(top["inference"]["decode_ratio"]["high"]), y=rounded(100 * top["recovered"]), showarrow=False,
            text=entry_label(top["entry"]), xanchor="left", xshift=7, font={"size": 11},
        )  # fmt: skip
    for y, name in ((0, "pruned"), (100, "dense")):
        figure.add_hline(y=y, line={"color": COLORS[name], "dash": "dash", "width": 1.5})
    styled(
        figure, "What is recovered, and what it costs at inference",
        "Time per generated token over the pruned model's, median and 95 % interval of interleaved rounds. Dashed: "
        f"dense (100) and pruned (0). Named: of each way of being served the best, controls aside. {_seeds(rows)}",
        width=PAGE, plot_height=300, above=30, legend=True,
    )  # fmt: skip
    figure.update_xaxes(title="decode time / pruned model's")
    figure.update_yaxes(title="log-perplexity recovered (%)")
    return figure


def _cost_trace(rows: Sequence[Row], kind: str, keeps_zeros: bool) -> go.Scatter:
    color, symbol = KINDS[kind]
    ratios = [row["inference"]["decode_ratio"] for row in rows]
    symbol = symbol.removesuffix("-open") + ("" if keeps_zeros else "-open")
    return go.Scatter(
        legendrank=_ORDER.index(kind),
        x=[rounded(r["median"]) for r in ratios], y=[rounded(100 * row["recovered"]) for row in rows], mode="markers",
        name=f"{kind}, {'zeros kept' if keeps_zeros else 'merging destroys zeros'}",
        text=[entry_label(row["entry"]) for row in rows], hoverinfo="text+x+y",
        error_x=error_bars([r["median"] for r in ratios], [(r["low"], r["high"]) for r in ratios]),
        marker={"color": color, "symbol": symbol, "size": 8, "line": {"width": 1.3, "color": color}},
    )  # fmt: skip


def _rows(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Finished entries: restorations, baselines, then controls, each with the best first."""
    rows = [row for row in summary(dict(comparison)) if row["seeds"]]
    if not rows:
        raise RequestError("expected a comparison with finished runs, got none; run it first")

    def place(row: Row) -> tuple[int, float, str]:
        value = row["recovered"]
        return _ORDER.index(entry_kind(row["entry"])), float("inf") if value is None else -value, row["entry"]

    return sorted(rows, key=place)


def _forest(rows: Sequence[Row], panels: Sequence[Panel], title: str, caption: str) -> go.Figure:
    labels = [entry_label(row["entry"]) for row in rows]
    return forest(labels, panels, KINDS, title=title, caption=caption, plot_height=_ROW * len(rows) + 10)


def _caption(comparison: Mapping[str, Any], rows: Sequence[Row]) -> str:
    settings = comparison["settings"]
    texts = settings.get("texts") or [settings.get("text", "text")]
    has_intervals = any(row.get("recovered_interval") is not None for row in rows)
    blocks = " Bars of recovery: 95 % interval, blocks of text drawn anew." if has_intervals else ""
    spread = " Other bars: 95 % t interval over seeds." if any(row["seeds"] > 1 for row in rows) else ""
    return (
        f"Trained on {settings['examples']} {Path(settings['data']).stem} examples; perplexity on {settings['blocks']} "
        f"blocks of {settings['block_length']} tokens of {Path(texts[0]).stem}, the rest on {settings['responses']} "
        f"held-out responses.{blocks}{spread} {_seeds(rows)}"
    )


def _seeds(rows: Sequence[Row], key: str = "seeds") -> str:
    counts = sorted({row.get(key, row["seeds"]) for row in rows})
    if counts[-1] == 1:
        return "One seed each."
    return f"{counts[0]} to {counts[-1]} seeds a row." if len(counts) > 1 else f"{counts[0]} seeds each."


def _seed_interval(row: Row, key: str) -> tuple[float, float] | None:
    """95 % t interval over seeds; None for a single seed."""
    spread, n = row[f"{key}_sd"], row["seeds"]
    if spread is None or n < 2:
        return None
    half = _T_975[min(n - 1, len(_T_975)) - 1] * spread / n**0.5
    return row[key] - half, row[key] + half


#: Quantile 0.975 of Student's t for 1 to 10 degrees of freedom; the last one serves for more.
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def _recovery_mark(row: Row) -> Mark:
    share, interval = row["recovered"], row.get("recovered_interval")
    ends = None if interval is None else (100 * interval[0], 100 * interval[1])
    return Mark(None if share is None else 100 * share, entry_kind(row["entry"]), ends)
