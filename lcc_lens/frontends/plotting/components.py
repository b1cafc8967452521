"""Figures of lost components: spectra, logit gains and promoted tokens."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from lcc_lens.analysis.lens.gain import LogitGain
from lcc_lens.analysis.lens.tokens import PromotedTokens
from lcc_lens.analysis.scan.result import Scan
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head, HeadLike, check_heads, head_indices
from lcc_lens.core.ranges import ranged
from lcc_lens.frontends.plotting.labels import pair_label
from lcc_lens.frontends.plotting.theme import COLORS, COLUMN, PAGE, SERIES, rounded, styled

_BAND = "rgba(77,77,77,0.18)"
_MIDDLE = "#4d4d4d"
_NORMAL_95 = 1.96


@ranged
def plot_spectra(scan: Scan, heads: Sequence[HeadLike] = ()) -> go.Figure:
    r"""Singular spectra of the heads' differences, and the share explained by the first k directions.

    Left: $S_i / \sqrt N$, the root mean square of the difference along direction i. Right:
    $\sum_{i \le k} S_i^2 / \sum_i S_i^2$. The line is the median head, the band holds 90 % of the heads.

    Args:
        scan: the scan of a pair.
        heads: up to four heads to draw as lines of their own.

    Raises:
        RequestError: more than four heads, or one that the model does not have.
    """
    if len(heads) > len(SERIES):
        raise RequestError(f"expected at most {len(SERIES)} heads in a figure of spectra, got {len(heads)}; name fewer")
    lost, alive = scan.components, head_indices(scan.ranking("mse"))
    chosen = [Head.of(head) for head in heads]
    if chosen:
        check_heads(chosen, *scan.relative_loss.shape)
    shown = lost.n_determined
    sizes = lost.singular_values[..., :shown] / lost.n_samples**0.5
    shares = 100 * lost.explained_share()[..., :shown]
    figure = make_subplots(1, 2, horizontal_spacing=0.12)
    for column, values in ((1, sizes), (2, shares)):
        for trace in _spread(values[alive], is_first=column == 1):
            figure.add_trace(trace, 1, column)
        for head, (color, _) in zip(chosen, SERIES, strict=False):
            line = _line(values[head], str(head), color, is_first=column == 1)
            figure.add_trace(line, 1, column)
    rank, record = float(lost.effective_rank[alive].median()), scan.record
    styled(
        figure, f"Directions in which pruning moved the heads of {Path(record.dense).name}",
        f"{pair_label(record.dense, record.pruned, record.sparsity, record.pattern)}. "
        f"{len(alive[0])} heads, {Path(record.data).name}: {lost.n_samples:,} samples "
        f"of {record.n_examples} sequences, seed {record.seed}. Effective rank of the median head: "
        f"{rank:.1f} of {lost.d_head}.",
        width=PAGE, plot_height=230, above=30,
    )  # fmt: skip
    figure.update_xaxes(title="direction i", col=1)
    figure.update_xaxes(title="directions k", col=2)
    figure.update_yaxes(title="S<sub>i</sub> / √N (units of z)", type="log", exponentformat="power", dtick=1, col=1)
    figure.update_yaxes(title="squared difference explained (%)", range=[0, 104], col=2)
    return figure


@ranged
def plot_logit_gain(gains: LogitGain | Sequence[LogitGain]) -> go.Figure:
    """Logit gain by component index, with 95 % intervals over examples (Eq. 6 of RestoreLCC).

    Args:
        gains: of one to four heads, all by component or all cumulative.

    Raises:
        RequestError: no gains, more than four, or both kinds.
    """
    several = [gains] if isinstance(gains, LogitGain) else list(gains)
    if not 1 <= len(several) <= len(SERIES) or len({gain.is_cumulative for gain in several}) > 1:
        raise RequestError(
            f"expected the gains of one to {len(SERIES)} heads, all cumulative or none, got {len(several)} heads; "
            "draw the others on their own"
        )
    figure = go.Figure()
    for gain, (color, symbol) in zip(several, SERIES, strict=False):
        mean, half = gain.mean, _NORMAL_95 * gain.stderr
        figure.add_scatter(
            x=list(range(1, len(mean) + 1)), y=[rounded(float(v)) for v in mean], name=str(gain.head),
            mode="markers", marker={"color": color, "symbol": symbol, "size": 5},
            error_y={"array": [rounded(float(v)) for v in half], "width": 0, "thickness": 1},
        )  # fmt: skip
    figure.add_hline(y=0, line={"color": COLORS["pruned"], "width": 1.2})
    is_sum = several[0].is_cumulative
    what = "of the first K components together" if is_sum else "of each component on its own"
    styled(
        figure, "What components bring to right over wrong answers",
        f"Logit gain {what}, read through the head alone; the line at 0 is the pruned model. Mean and 95 % interval "
        f"over {several[0].gains.shape[0]} examples.",
        width=COLUMN, plot_height=230, above=30, legend=True,
    )  # fmt: skip
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200) if tick <= several[0].gains.shape[1]]
    title = "components K" if is_sum else "component index i"
    figure.update_xaxes(title=title, type="log", tickvals=ticks, ticktext=[str(tick) for tick in ticks])
    figure.update_yaxes(title="logit gain (logits)")
    return figure


@ranged
def plot_promoted_tokens(promoted: PromotedTokens) -> go.Figure:
    """Table of the tokens that a component promotes and suppresses through the logit lens, with their logits."""
    sides = {side: [t for t in promoted.tokens if t.side == side] for side in ("promoted", "suppressed")}
    columns = [
        column for side in sides.values()
        for column in ([visible(t.text) for t in side], [f"{t.logit:+.2f}" for t in side])
    ]  # fmt: skip
    colors = [COLORS["restored"], COLORS["restored"], COLORS["pruned"], COLORS["pruned"]]
    rows = max(len(column) for column in columns)
    figure = go.Figure(
        go.Table(
            header={
                "values": ["<b>promoted</b>", "logit", "<b>suppressed</b>", "logit"], "align": ["left", "right"] * 2,
                "fill": {"color": "white"}, "line": {"color": "#bbb"}, "font": {"color": colors}, "height": 30,
            },
            cells={
                "values": columns, "align": ["left", "right"] * 2, "fill": {"color": "white"},
                "line": {"color": "#e8e8e8"}, "height": 22,
            },
            columnwidth=[3, 1.3, 3, 1.3],
        )
    )  # fmt: skip
    reading = {
        "alone": "Read on its own: through final norm and unembedding (Eq. 6), which shows its direction.",
        "direct": "Read where it acts: at the norm's scale of actual residual streams.",
    }[promoted.reading]
    styled(
        figure, f"What the component of {promoted.head} says", f"{reading} ␣ is a space.",
        width=COLUMN, plot_height=30 + 22 * rows + 6, below=12,
    )  # fmt: skip
    figure.update_layout(margin={"l": 10, "r": 10})
    return figure


def visible(text: str) -> str:
    """A token as it can be read: spaces and line ends marked, other signs that print nothing escaped."""
    marked = text.replace(" ", "␣")
    return escape("".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in marked)) or "(nothing)"


def _spread(values: Float[Tensor, "part component"], *, is_first: bool) -> list[go.Scatter]:
    low, middle, high = torch.quantile(
        values.double(), torch.tensor([0.05, 0.5, 0.95]).to(values.device, torch.float64), dim=0
    )
    edge = {"width": 0}
    return [
        _line(low, "", "rgba(0,0,0,0)", is_first=False).update(hoverinfo="skip", line=edge),
        _line(high, "90 % of heads", "rgba(0,0,0,0)", is_first=is_first).update(
            fill="tonexty", fillcolor=_BAND, line=edge, hoverinfo="skip"
        ),
        _line(middle, "median head", _MIDDLE, is_first=is_first),
    ]


def _line(values: Float[Tensor, " component"], name: str, color: str, *, is_first: bool) -> go.Scatter:
    return go.Scatter(
        x=list(range(1, len(values) + 1)), y=[rounded(float(v)) for v in values], mode="lines", name=name,
        line={"color": color, "width": 2}, legendgroup=name, showlegend=is_first,
    )  # fmt: skip
