"""A figure of recovery by kind of text."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from lcc_lens.core.errors import RequestError
from lcc_lens.evaluation.comparison.compare import summary
from lcc_lens.frontends.plotting.labels import entry_kind, entry_label
from lcc_lens.frontends.plotting.theme import PAGE, rounded, styled

_ROW = 30  # pixels per row
#: From worse than pruned over nothing recovered to everything.
_SCALE = [[0.0, "#D55E00"], [0.5, "#ffffff"], [1.0, "#009E73"]]


def plot_domains(comparison: Mapping[str, Any]) -> go.Figure:
    """The fraction of the lost log-perplexity that every entry recovered on every kind of text, best mean first.

    Mean and worst come first; a star marks kinds of text that were in no data of any entry. Controls on the dense model
    are left out.

    Args:
        comparison: result of :func:`lcc_lens.evaluation.comparison.compare.compare`, or ``comparison.json``.

    Raises:
        RequestError: no finished run that measured several kinds of text.
    """
    rows = [row for row in summary(dict(comparison)) if len(row["domains"]) > 1 and row["recovered_mean"] is not None]
    if not rows:
        raise RequestError("expected a comparison that measured several kinds of text, got none; compare with --texts")
    rows.sort(key=lambda row: row["recovered_mean"])
    texts, n_seeds = list(rows[0]["domains"]), sorted({row["seeds"] for row in rows})
    is_seen = {text: any(row["domains"][text]["in_pool"] for row in rows) for text in texts}
    columns = ["<b>mean</b>", "<b>worst</b>", *(escape(text) + ("" if is_seen[text] else " *") for text in texts)]
    shares = [
        [row["recovered_mean"], row["recovered_worst"], *(row["domains"][text]["recovered"] for text in texts)]
        for row in rows
    ]
    percent = [[None if share is None else rounded(100 * share) for share in line] for line in shares]
    figure = go.Figure(
        go.Heatmap(
            z=percent, x=columns, y=[escape(entry_label(row["entry"])) for row in rows], zmin=-100, zmax=100,
            colorscale=_SCALE, showscale=False, xgap=2, ygap=2, texttemplate="%{z:.0f}",
            customdata=[[entry_kind(row["entry"])] * len(columns) for row in rows],
            hovertemplate="<b>%{y}</b> (%{customdata})<br>%{x}: %{z:.1f} % recovered<extra></extra>",
        )
    )  # fmt: skip
    settings, seeds = comparison["settings"], " to ".join(map(str, dict.fromkeys([n_seeds[0], n_seeds[-1]])))
    styled(
        figure, "What is recovered on every kind of text",
        f"Per cent of the lost log-perplexity (100: dense, 0: pruned), {settings['blocks']} held-out blocks of "
        f"{settings['block_length']} tokens each. Trained on {settings['examples']} examples of "
        f"{Path(settings['data']).stem}; *: text of a kind that no row was calibrated or trained on. Seeds a row: "
        f"{seeds}.",
        width=PAGE, plot_height=_ROW * len(rows) + 10,
    )  # fmt: skip
    return figure
