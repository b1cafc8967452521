"""Figures of one prompt in several models: next tokens, changed heads, attention patterns."""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lcc_lens.analysis.lens.prompt import PromptComparison
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import HeadLike, check_heads
from lcc_lens.core.ranges import ranged
from lcc_lens.frontends.plotting.components import visible
from lcc_lens.frontends.plotting.theme import COLORS, PAGE, SEQUENTIAL, SERIES, rounded, styled

_ROW = 13  # pixels per layer
#: Tokens whose texts fit along an axis.
_MOST_LABELS = 40


@ranged
def plot_prompt(seen: PromptComparison, k: int = 8) -> go.Figure:
    """Next-token probabilities of a prompt, and how much each head's output changed on it.

    Args:
        seen: the comparison.
        k: next tokens to show, those that the dense model finds likeliest.

    Example:
        >>> plot_prompt(lcc.compare_prompt(pair, "The capital of France is")).show()  # doctest: +SKIP
    """
    changed = seen.models[1:]
    n_layers, n_heads = seen.norm.shape[2:]
    figure = make_subplots(
        1, 1 + len(changed), column_widths=[1.3, *[1.0] * len(changed)], horizontal_spacing=0.09,
        subplot_titles=["", *(f"{name}: head outputs" for name in changed)],
    )  # fmt: skip
    rows = seen.next_tokens(k).head(k).iloc[::-1]
    texts = [visible(token) for token in rows["token"]]
    for name in reversed(seen.models):
        figure.add_bar(
            x=[rounded(100 * value) for value in rows[name]], y=list(range(len(texts))), customdata=texts, name=name,
            orientation="h", marker={"color": COLORS.get(name, SERIES[0][0])},
            hovertemplate="%{customdata}: %{x:.2f} %", row=1, col=1,
        )  # fmt: skip
    most = 100 * max(float(seen.change(name).max()) for name in changed)
    for column, name in enumerate(changed, start=2):
        figure.add_heatmap(
            z=[[rounded(100 * float(value)) for value in row] for row in seen.change(name)], xgap=1, ygap=1,
            colorscale=SEQUENTIAL, zmin=0, zmax=rounded(most), showscale=column == 2, name=name,
            colorbar={"title": {"text": "changed (%)", "side": "right"}, "thickness": 12, "outlinewidth": 0},
            hovertemplate="<b>L%{y}H%{x}</b><br>changed: %{z:.1f} %", row=1, col=column,
        )  # fmt: skip
    styled(
        figure, f"Next tokens and changed heads on “{seen.prompt}”",
        f"{len(seen.pieces)} tokens. Head outputs: |z − z dense| / |z dense|, root mean square over the prompt.",
        width=PAGE, plot_height=max(220, _ROW * n_layers), above=30, legend=True,
    )  # fmt: skip
    figure.update_layout(barmode="group", legend={"traceorder": "reversed"})
    figure.update_annotations(font_size=12, yshift=2)
    figure.update_xaxes(title="probability of the next token (%)", col=1)
    figure.update_yaxes(tickvals=list(range(len(texts))), ticktext=texts, showgrid=False, col=1)  # texts may be equal
    for column in range(2, 2 + len(changed)):
        figure.update_xaxes(title="head", dtick=4 if n_heads > 16 else 1, showgrid=False, col=column)
        figure.update_yaxes(
            dtick=1 if n_layers <= 16 else 5, autorange="reversed", showgrid=False,
            title="layer" if column == 2 else None, col=column,
        )  # fmt: skip
    return figure


@ranged
def plot_attention(seen: PromptComparison, head: HeadLike) -> go.Figure:
    """Attention pattern of one head on a prompt, one panel per model: rows are queries, columns keys.

    Raises:
        RequestError: a head that the models do not have, or a comparison without patterns.
    """
    (head,) = check_heads([head], *seen.norm.shape[2:])
    if seen.patterns is None:
        raise RequestError("expected attention patterns, got none; compare with patterns=True on a model that has them")
    labels = [f"{place} {visible(piece)}" for place, piece in enumerate(seen.pieces)]
    figure = make_subplots(
        1, len(seen.models), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=list(seen.models)
    )
    for column, name in enumerate(seen.models, start=1):
        figure.add_heatmap(
            z=[[rounded(float(value), 3) for value in row] for row in seen.patterns[column - 1, head.layer, head.head]],
            x=labels, y=labels, colorscale=SEQUENTIAL, zmin=0, zmax=1, showscale=column == 1, name=name,
            colorbar={"title": {"text": "attention", "side": "right"}, "thickness": 12, "outlinewidth": 0},
            hovertemplate="from <b>%{y}</b><br>to <b>%{x}</b>: %{z:.3f}", row=1, col=column,
        )  # fmt: skip
    styled(
        figure, f"Where {head} attends on “{seen.prompt}”",
        "Attention pattern; every row sums to 1. Rows are the attending tokens, columns the attended ones.",
        width=PAGE, plot_height=250, above=26, below=64,
    )  # fmt: skip
    figure.update_annotations(font_size=12)
    step = max(1, len(labels) // _MOST_LABELS)
    figure.update_xaxes(showgrid=False, tickangle=-60, dtick=step, tickfont={"size": 10})
    figure.update_yaxes(showgrid=False, autorange="reversed", dtick=step, tickfont={"size": 10})
    return figure
