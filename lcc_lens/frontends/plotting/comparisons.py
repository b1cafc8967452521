"""Comparisons: before and after, against baselines and controls, and against what they cost."""

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
from lcc_lens.frontends.plotting.theme import COLORS, KINDS, PAGE, rounded, styled

_ROW = 22  # pixels per row
_ORDER = list(KINDS)
Row = Mapping[str, Any]


def plot_comparison(found: Mapping[str, Any]) -> go.Figure:
    """What every line of a comparison brings back on other text and in divergence, between dense and pruned.

    Restorations come first, then baselines, then controls; each by the share recovered. Lines of controls on the dense
    model recover nothing by definition and stand below with their losses.

    Args:
        found: what :func:`lcc_lens.evaluation.comparison.compare.compare` returns, or ``comparison.json``.

    Raises:
        RequestError: no finished cell.
    """
    rows, bare = _rows(found), found["bare"]
    measures = {"kl": "KL to dense (nats/token)", "response_loss": "response loss (nats/token)"}
    recovered = [
        Mark(_scaled(row["recovered"]), entry_kind(row["entry"]), _scaled_pair(row.get("recovered_interval")))
        for row in rows
    ]  # fmt: skip
    panels = [Panel("log-perplexity<br>recovered (%)", [[mark] for mark in recovered], {"dense": 100.0, "pruned": 0.0})]
    for key, title in measures.items():
        marks = [[Mark(row[key], entry_kind(row["entry"]), _seed_interval(row, key))] for row in rows]
        references = {name: bare[name][key] for name in ("dense", "pruned")}
        panels.append(Panel(title.replace(" (", "<br>("), marks, references))
    figure = forest([entry_label(row["entry"]) for row in rows], panels, KINDS)
    return _framed(figure, "What restorations bring back", _caption(found, rows), len(rows))


def plot_tasks(found: Mapping[str, Any]) -> go.Figure:
    """Zero-shot accuracy before and after, task by task, beside baselines and controls.

    Bars are 95 % intervals of the gain over the pruned model on the same items, drawn anew.

    Args:
        found: what :func:`lcc_lens.evaluation.comparison.compare.compare` returns, or ``comparison.json``.

    Raises:
        RequestError: the comparison measured no task.
    """
    rows, bare = [row for row in _rows(found) if row["tasks"]], found["bare"]
    if not rows:
        raise RequestError("expected a comparison with zero-shot tasks, got none; compare with --tasks arc_easy piqa")
    panels = []
    for task, one in rows[0]["tasks"].items():
        before = 100 * bare["pruned"]["tasks"][task]["acc"]
        marks = []
        for row in rows:
            low, high = (before + 100 * end for end in row["tasks"][task]["gain_interval"])
            marks.append([Mark(100 * row["tasks"][task]["acc"], entry_kind(row["entry"]), (low, high))])
        references = {"dense": 100 * bare["dense"]["tasks"][task]["acc"], "pruned": before}
        panels.append(Panel(f"{escape(task)}<br>accuracy (%)<br>n = {one['n']}", marks, references))
    figure = forest([entry_label(row["entry"]) for row in rows], panels, KINDS)
    caption = (
        f"Bars: 95 % interval of the gain over the pruned model, items drawn anew. {_seeds(rows, 'accuracy_seeds')}"
    )
    return _framed(figure, "Zero-shot accuracy before and after", caption, len(rows))


def plot_inference_cost(found: Mapping[str, Any]) -> go.Figure:
    """What is recovered against the time per generated token, and whether pruned weights stay zero.

    Args:
        found: what :func:`lcc_lens.evaluation.comparison.compare.compare` returns, or ``comparison.json``.

    Raises:
        RequestError: the comparison timed nothing.
    """
    rows = [row for row in _rows(found) if row.get("inference") and row["recovered"] is not None]
    if not rows:
        raise RequestError(
            "expected a comparison with times at inference, got none; compare again: it times at the end"
        )
    rows.sort(key=lambda row: -row["recovered"])
    figure = go.Figure()
    best: set[float] = set()
    for kind in reversed(_ORDER):  # restorations last, so that controls do not hide them
        for keeps in (True, False):
            some = [r for r in rows if entry_kind(r["entry"]) == kind and ((r["zeros_kept"] or 1.0) >= 1.0) == keeps]
            if some:
                figure.add_trace(_cost_trace(some, kind, keeps))
    for row in (row for row in rows if entry_kind(row["entry"]) != "control"):
        ratio = row["inference"]["decode_ratio"]["median"]
        if ratio not in best:
            best.add(ratio)
            figure.add_annotation(
                x=rounded(ratio), y=rounded(100 * row["recovered"]), text=entry_label(row["entry"]), showarrow=False,
                xanchor="left", xshift=8, yshift=8, font={"size": 11},
            )  # fmt: skip
    figure.add_hline(y=0, line={"color": COLORS["pruned"], "dash": "dash", "width": 1.5})
    figure.add_hline(y=100, line={"color": COLORS["dense"], "dash": "dash", "width": 1.5})
    styled(
        figure, "What is recovered, and what it costs at inference",
        "Time per generated token over the pruned model's, median and 95 % interval of interleaved rounds. Dashed: "
        f"dense (100) and pruned (0). Named: of each way of being served the best, controls aside. {_seeds(rows)}",
        width=PAGE, plot_height=300, above=30,
    )  # fmt: skip
    figure.update_layout(showlegend=True)
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
        error_x={
            "type": "data", "symmetric": False, "width": 0, "thickness": 1,
            "array": [rounded(r["high"] - r["median"]) for r in ratios],
            "arrayminus": [rounded(r["median"] - r["low"]) for r in ratios],
        },
        marker={"color": color, "symbol": symbol, "size": 8, "line": {"width": 1.3, "color": color}},
    )  # fmt: skip


def _rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Finished lines, restorations before baselines before controls, the best first."""
    rows = [row for row in summary(dict(found)) if row["seeds"]]
    if not rows:
        raise RequestError("expected a comparison with finished cells, got none; run it first")

    def place(row: Row) -> tuple[int, float, str]:
        value = row["recovered"]
        return _ORDER.index(entry_kind(row["entry"])), float("inf") if value is None else -value, row["entry"]

    return sorted(rows, key=place)


def _framed(figure: go.Figure, title: str, caption: str, n_rows: int) -> go.Figure:
    return styled(figure, title, caption, width=PAGE, plot_height=_ROW * n_rows + 10, above=30, below=62)


def _caption(found: Mapping[str, Any], rows: Sequence[Row]) -> str:
    settings = found["settings"]
    texts = settings.get("texts") or [settings.get("text", "text")]
    blocks = " Bars of recovery: 95 % interval, blocks of text drawn anew." if _has(rows, "recovered_interval") else ""
    spread = " Other bars: 95 % t interval over seeds." if any(row["seeds"] > 1 for row in rows) else ""
    return (
        f"Trained on {settings['examples']} {Path(settings['data']).stem} examples; perplexity on {settings['blocks']} "
        f"blocks of {settings['block_length']} tokens of {Path(texts[0]).stem}, the rest on {settings['responses']} "
        f"held-out responses.{blocks}{spread} {_seeds(rows)}"
    )


def _has(rows: Sequence[Row], key: str) -> bool:
    return any(row.get(key) is not None for row in rows)


def _seeds(rows: Sequence[Row], key: str = "seeds") -> str:
    counts = sorted({row.get(key, row["seeds"]) for row in rows})
    if counts[-1] == 1:
        return "One seed each."
    return f"{counts[0]} to {counts[-1]} seeds a row." if len(counts) > 1 else f"{counts[0]} seeds each."


def _seed_interval(row: Row, key: str) -> tuple[float, float] | None:
    """Mean and spread over seeds as a 95 % t interval; none for a single seed."""
    spread, n = row[f"{key}_sd"], row["seeds"]
    if spread is None or n < 2:
        return None
    half = _T_975[min(n - 1, len(_T_975)) - 1] * spread / n**0.5
    return row[key] - half, row[key] + half


#: Student's t at 0.975 for 1, 2, ... degrees of freedom; more than ten are taken as ten.
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def _scaled(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _scaled_pair(pair: Sequence[float] | None) -> tuple[float, float] | None:
    return None if pair is None else (100 * pair[0], 100 * pair[1])
