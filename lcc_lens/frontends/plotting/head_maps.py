"""Layer x head maps: relative change of every head, and ranks of selector scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from lcc_lens.analysis.head_scores import HeadScores
from lcc_lens.analysis.scan.result import Scan
from lcc_lens.analysis.selectors.names import ALWAYS_SCORED
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import HeadLike, check_heads
from lcc_lens.core.ranges import ranged
from lcc_lens.frontends.plotting.labels import GOLD, SELECTOR_LABELS, pair_label
from lcc_lens.frontends.plotting.theme import COLORS, COLUMN, PAGE, RANKS, SEQUENTIAL, largest_change, rounded, styled

_ROW, _SMALL_ROW = 13, 9  # pixels per layer, alone and among several maps
_PER_LINE = 4  # maps side by side


@ranged
def plot_loss_map(scan: Scan, heads: Sequence[HeadLike] = ()) -> go.Figure:
    r"""Layer x head loss map: relative change of each head's output.

    Each cell shows $\sqrt{\sum|\delta|^2 / \sum|z_{dense}|^2}$; the hover text adds the cosine, the constant share, the
    share of the first direction and, for a head that moved, its place in the dense model. Removed heads are blank. A
    head whose output is zero in the dense model alone has no relative change: it gets the largest one's colour.

    Args:
        scan: the scan of a pair.
        heads: the chosen heads, which get a frame.

    Raises:
        RequestError: a head that the model does not have.
    """
    n_layers, n_heads = scan.relative_loss.shape
    chosen = check_heads(heads, n_layers, n_heads) if heads else []
    most = largest_change(scan.relative_loss)
    figure = go.Figure(
        go.Heatmap(
            z=_present(scan, _rows(100 * scan.relative_loss.clamp(max=most))), customdata=_hover_values(scan),
            xgap=1, ygap=1, colorscale=SEQUENTIAL, zmin=0, zmax=rounded(100 * most),
            colorbar=_colorbar("changed (%)"),
            hovertemplate=(
                "<b>L%{y}H%{x}</b><br>changed: %{z:.1f} %<br>cosine to dense: %{customdata[0]:.3f}"
                "<br>constant share: %{customdata[1]:.1f} %<br>first direction: %{customdata[2]:.1f} %"
                "%{customdata[3]}%{customdata[4]}<extra></extra>"
            ),
        )
    )  # fmt: skip
    for head in chosen:
        figure.add_shape(
            type="rect", x0=head.head - 0.5, x1=head.head + 0.5, y0=head.layer - 0.5, y1=head.layer + 0.5,
            line={"color": COLORS["restored"], "width": 2},
        )  # fmt: skip
    framed = f" Framed: the {len(chosen)} chosen heads." if chosen else ""
    silent = [head for head in scan.ranking("mse") if bool(scan.relative_loss[head].isinf())]
    without = f" Without output in the dense model, drawn darkest: {', '.join(map(str, silent))}." if silent else ""
    caption = f"|z dense − z pruned| / |z dense|, root mean square over positions.{framed}{without}\n{_data_of(scan)}"
    wide = n_heads > 16
    styled(
        figure, f"What each head of {Path(scan.record.dense).name} lost", caption,
        width=PAGE if wide else COLUMN, plot_height=max(200, _ROW * n_layers),
    )  # fmt: skip
    figure.update_xaxes(title="head", dtick=4 if wide else 1, showgrid=False)
    figure.update_yaxes(title="layer", dtick=1 if n_layers <= 16 else 5, autorange="reversed", showgrid=False)
    return figure


@ranged
def plot_selectors(scan: Scan, selectors: Sequence[str] | None = None) -> go.Figure:
    """Ranks of every head by selector, side by side: dark heads would be restored first.

    Colours are ranks, since scores have different units; the hover text gives the score with its standard error.
    Activation patching, the gold standard, comes first; the other titles give their rank correlation with it.

    Args:
        scan: the scan of a pair.
        selectors: the selectors; all that the scan has scores for if not given.

    Raises:
        RequestError: no selector, or one that the scan has no scores for.
    """
    names: list[str] = list(selectors) if selectors is not None else _available(scan)
    if not names:
        raise RequestError("expected at least one selector to draw, got none; name some")
    names.sort(key=lambda name: name != GOLD)
    scores = {name: scan.scores(name) for name in names}
    gold = scores.get("patching")
    n_layers, n_heads = scan.relative_loss.shape
    columns = min(_PER_LINE, len(names))
    lines = -(-len(names) // columns)
    figure = make_subplots(
        lines, columns, shared_xaxes=True, shared_yaxes=True, horizontal_spacing=0.025, vertical_spacing=0.09 / lines,
        subplot_titles=[_map_title(name, scores[name], gold) for name in names],
    )  # fmt: skip
    for number, name in enumerate(names):
        line, column = divmod(number, columns)
        figure.add_trace(_rank_map(scan, scores[name], is_first=number == 0), line + 1, column + 1)
    agreement = " Brackets: rank correlation with activation patching, the gold standard." if gold else ""
    height = _SMALL_ROW * n_layers * lines + 30 * (lines - 1)
    styled(
        figure, "Which heads selectors would restore first",
        f"Rank of each head's score, 100 % first.{agreement}\n{_data_of(scan)}",
        width=PAGE if columns > 2 else COLUMN, plot_height=max(200, height), above=26,
    )  # fmt: skip
    figure.update_annotations(font_size=12)
    figure.update_xaxes(dtick=4 if n_heads > 16 else 1, showgrid=False)
    figure.update_yaxes(dtick=1 if n_layers <= 16 else 5, showgrid=False, range=[n_layers - 0.5, -0.5])
    figure.update_xaxes(title="head", row=lines)
    figure.update_yaxes(title="layer", col=1)
    return figure


def _colorbar(title: str) -> dict[str, Any]:
    return {
        "title": {"text": title, "side": "right", "font": {"size": 12}}, "thickness": 12, "outlinewidth": 0, "len": 1,
    }  # fmt: skip


def _available(scan: Scan) -> list[str]:
    scored = (*scan.selected_by, *ALWAYS_SCORED)
    return [name for name in dict.fromkeys((*SELECTOR_LABELS, *scored)) if name in scored]


def _map_title(name: str, scores: HeadScores, gold: HeadScores | None) -> str:
    label = SELECTOR_LABELS.get(name, name)
    if gold is None or name == GOLD:
        return label
    return f"{label} ({gold.rank_correlation(scores):.2f})"


def _rank_map(scan: Scan, scores: HeadScores, *, is_first: bool) -> go.Heatmap:
    value = scores.value.double().nan_to_num(nan=-math.inf)
    flat = value.flatten()
    below = (flat[None] < flat[:, None]).sum(1) + ((flat[None] == flat[:, None]).sum(1) - 1) / 2  # ties share a rank
    ranks = (100 * below / max(1, flat.numel() - 1)).reshape(value.shape)
    details = [
        [[rounded(float(a)), rounded(float(b))] for a, b in zip(*rows, strict=True)]
        for rows in zip(scores.value, scores.stderr, strict=True)
    ]
    return go.Heatmap(
        z=_present(scan, _rows(ranks)), customdata=details, colorscale=RANKS, zmin=0, zmax=100, xgap=1, ygap=1,
        showscale=is_first, colorbar=_colorbar("rank (%)"),
        hovertemplate=(
            "<b>L%{y}H%{x}</b><br>score: %{customdata[0]:.4g} ± %{customdata[1]:.2g}<br>rank: %{z:.0f} %<extra></extra>"
        ),
    )  # fmt: skip


def _data_of(scan: Scan) -> str:
    record = scan.record
    positions = f"{record.positions} positions" if isinstance(record.positions, str) else "chosen positions"
    return (
        f"{pair_label(record.dense, record.pruned, record.sparsity, record.pattern)}. "
        f"{Path(record.data).name}: {record.n_examples} sequences, {record.n_samples:,} samples ({positions}), "
        f"seed {record.seed}."
    )


def _hover_values(scan: Scan) -> list[list[list[Any]]]:
    first = scan.components.explained_share()[..., 0]
    accuracy = scan.scores("probe").value if "probe" in scan.selected_by else None
    n_layers, n_heads = scan.relative_loss.shape

    def cell(layer: int, head: int) -> list[Any]:
        probe = "" if accuracy is None else f"<br>probe accuracy: {100 * float(accuracy[layer, head]):.1f} %"
        constant, direction = 100 * float(scan.constant_share[layer, head]), 100 * float(first[layer, head])
        was = scan.head_map.dense_heads[layer][head]
        moved = "" if was == head else f"<br>in the dense model: L{layer}H{was}"
        if bool(scan.relative_loss[layer, head].isinf()):
            moved += "<br>no output in the dense model: changed by more than all others"
        return [rounded(float(scan.cosine[layer, head])), rounded(constant), rounded(direction), probe, moved]

    return [[cell(layer, head) for head in range(n_heads)] for layer in range(n_layers)]


def _present(scan: Scan, rows: list[list[float | None]]) -> list[list[float | None]]:
    """The rows with None for removed heads."""
    removed = scan.head_map.removed
    return [[None if h in removed[i] else value for h, value in enumerate(row)] for i, row in enumerate(rows)]


def _rows(values: Float[Tensor, "layer head"]) -> list[list[float | None]]:
    return [[rounded(float(value)) for value in row] for row in values]
