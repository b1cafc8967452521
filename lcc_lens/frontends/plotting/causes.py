"""Figures of why heads lost: causes per layer, head types in every model, and what a restoration leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lcc_lens.analysis.causes.recovered import Recovered
from lcc_lens.analysis.causes.upstream import Upstream
from lcc_lens.analysis.head_types.result import PATTERN_TYPES, HeadTypes, HeadTypesRecord
from lcc_lens.analysis.scan.result import Scan
from lcc_lens.core.errors import RequestError
from lcc_lens.core.ranges import ranged
from lcc_lens.frontends.plotting.labels import pair_label
from lcc_lens.frontends.plotting.theme import COLORS, COLUMN, PAGE, SERIES, rounded, styled

_GREY = "#9a9a9a"
#: Name and colour of every cause; the MLP's second and third take those of the head's.
_CAUSES = {
    "inherited": ("inherited", _GREY),
    "pattern": ("own pattern", SERIES[1][0]),
    "gate_up": ("own gate and up", SERIES[1][0]),
    "value": ("own values", SERIES[2][0]),
    "down": ("own down projection", SERIES[2][0]),
    "constant": ("its own constant", COLORS["restored"]),
}
_KIND_WORDS = {"previous": "previous token", "duplicate": "duplicate token", "sink": "first token"}
_MEASURE_WORDS = {
    "sink": "attention on the first token",
    "entropy": "entropy of attention, in nats",
    "distance": "tokens looked back",
}


@ranged
def plot_causes(scan: Scan) -> go.Figure:
    """Causes of the difference per layer, as stacked fractions: of the heads, and of the MLP's output.

    Args:
        scan: a scan with causes.

    Raises:
        RequestError: the scan has no causes.
    """
    if scan.causes is None:
        raise RequestError("expected a scan with causes, got one without; scan again with --causes")
    table, record = scan.causes.layer_table(), scan.record
    sites = list(dict.fromkeys(table["site"]))
    words = {"z": "head outputs", "mlp": "MLP outputs"}
    figure = make_subplots(1, len(sites), shared_yaxes=True, subplot_titles=[words[site] for site in sites])
    for column, site in enumerate(sites, start=1):
        for cause, rows in table[table["site"] == site].groupby("cause", sort=False):
            _stack(figure, str(cause), rows["layer"].tolist(), rows["fraction"].tolist(), column)
    styled(
        figure, f"Why the heads of {Path(record.dense).name} lost",
        "Fractions of the squared difference, mean over a layer's heads. "
        f"{pair_label(record.dense, record.pruned, record.sparsity, record.pattern)}. {Path(record.data).name}: "
        f"{record.n_examples} sequences, {record.n_samples:,} samples, seed {record.seed}.",
        width=PAGE, plot_height=260, above=66, legend=True,
    )  # fmt: skip
    return _stacked(figure, "squared difference (%)")


@ranged
def plot_recovered(recovered: Recovered) -> go.Figure:
    """What a restoration leaves of the heads' squared difference per layer, by cause, beside what pruning did.

    Args:
        recovered: of ``scan.against(restored_scan)``.

    Raises:
        RequestError: a scan had no causes.
    """
    if recovered.before is None or recovered.after is None:
        raise RequestError("expected two scans with causes, got one without; scan again with --causes")
    figure = make_subplots(1, 2, shared_yaxes=True, subplot_titles=["pruned", "restored"])
    layers = list(range(len(recovered.remaining)))
    for column, parts in enumerate((recovered.before, recovered.after), start=1):
        for cause, value in parts.items():
            if bool((value.abs() > 1e-6).any()):
                _stack(figure, cause, layers, value.double().nanmean(1).tolist(), column)
    styled(
        figure, "What a restoration leaves of each head's difference, by cause",
        "Fractions of the pruned heads' squared difference, mean over a layer's heads: "
        f"{100 * float(recovered.remaining.double().nanmean()):.1f} % remain.",
        width=PAGE, plot_height=260, above=66, legend=True,
    )  # fmt: skip
    return _stacked(figure, "squared difference before (%)")


def plot_cause_study(study: Mapping[str, Any]) -> go.Figure:
    """Causes per layer of the first pruned model of a study, and what every restoration of it leaves, by cause.

    Args:
        study: the content of ``benchmarks/causes.json``.
    """
    name, parts = next(iter(study["parts"].items()))
    left = {"pruned": parts[0]["mean_over_heads"], **{m: one["by_cause"] for m, one in study["recovered"].items()}}
    figure = make_subplots(1, 2, subplot_titles=["pruned, by layer", "all layers"], column_widths=[0.68, 0.32])
    for cause in ("inherited", "pattern", "value"):
        by_layer = zip(*(part["by_layer"][cause] for part in parts), strict=True)
        means = [fmean(values) for values in by_layer]
        _stack(figure, cause, list(range(len(means))), means, 1)
    for cause in ("inherited", "pattern", "value", "constant"):
        values = [by_cause.get(cause, 0.0) for by_cause in left.values()]
        if any(abs(value) > 1e-6 for value in values):
            _stack(figure, cause, list(left), values, 2)
    styled(
        figure, "Why heads lost, and what is left after a restoration",
        f"Fractions of the pruned heads' squared difference, means over heads. {name}, {parts[0]['samples']:,} tokens, "
        f"{len(parts)} seeds at the left, one at the right.",
        width=PAGE, plot_height=260, above=66, legend=True,
    )  # fmt: skip
    _stacked(figure, "squared difference before (%)")
    figure.update_yaxes(rangemode="tozero")
    return figure.update_xaxes(title="", col=2)


@ranged
def plot_head_types(types: HeadTypes, kinds: Sequence[str] = PATTERN_TYPES, n: int = 10) -> go.Figure:
    """The dense model's strongest heads of each type, and what is left of them in the other models.

    Args:
        types: of :func:`~lcc_lens.analysis.head_types.head_types.head_types`.
        kinds: such as ``induction``; see :meth:`HeadTypes.strongest`.
        n: heads per type.

    Raises:
        RequestError: no type, an unknown one, or fewer than one head.
    """
    if not kinds:
        raise RequestError("expected at least one type of heads to draw, got none; name some")
    titles = [_KIND_WORDS.get(kind, kind) for kind in kinds]
    figure = make_subplots(1, len(kinds), subplot_titles=titles, horizontal_spacing=0.12)
    for column, kind in enumerate(kinds, start=1):
        table = types.strongest(kind, n).iloc[::-1]
        names = [f"L{layer}H{head}" for layer, head in zip(table["layer"], table["head"], strict=True)]
        for model in reversed(types.record.models):
            figure.add_bar(
                x=[rounded(value) for value in table[f"{kind}_{model}"]], y=names, name=model, orientation="h",
                marker={"color": COLORS[model]}, legendgroup=model, showlegend=column == 1,
                hovertemplate="%{y}: %{x:.3f}", row=1, col=column,
            )  # fmt: skip
    styled(
        figure, "Head types, and what is left of the strongest", _measured_on(types.record, kinds),
        width=PAGE, plot_height=max(180, 26 * n), above=50, legend=True,
    )  # fmt: skip
    figure.update_layout(barmode="group", legend={"traceorder": "reversed", "y": 1.08})
    figure.update_annotations(font_size=12)
    figure.update_xaxes(title="score", rangemode="tozero")
    figure.update_yaxes(showgrid=False)
    return figure


def _measured_on(record: HeadTypesRecord, kinds: Sequence[str]) -> str:
    """What the scores of each type are, in words, and what they were measured on."""
    sentences = []
    if any(kind in PATTERN_TYPES for kind in kinds):
        sentences.append(
            f"Share of attention at the type's places, {record.n_sequences} sequences of {record.length} random "
            f"tokens, each repeated, seed {record.seed}."
        )
    measures = [_MEASURE_WORDS[kind] for kind in kinds if kind in _MEASURE_WORDS]
    if measures:
        n_texts = "" if record.n_texts is None else f", {record.n_texts} texts"
        sentences.append(f"Means over tokens: {'; '.join(measures)}. {Path(record.data).name}{n_texts}.")
    if "copying" in kinds:
        sentences.append("Copying: the sum of a head's eigenvalues over that of their sizes, from weights alone.")
    return " ".join(sentences)


@ranged
def plot_upstream(upstream: Upstream, n: int = 10) -> go.Figure:
    """The writers that a head inherits its difference from, as a graph: layers from left to right, lines to the head.

    Thick lines are large effects; orange ones make the head's difference, blue ones work against it.

    Args:
        upstream: of :func:`~lcc_lens.analysis.causes.upstream.trace_upstream`.
        n: the strongest writers.
    """
    table, target = upstream.table().head(n), upstream.head
    largest = max(float(table["direct"].abs().max()), 1e-9)
    heights = [(row + 1) / (len(table) + 1) for row in range(len(table))]
    figure = go.Figure()
    table = table.sort_values("layer")
    for y, row in zip(heights, table.to_dict("records"), strict=True):
        color = COLORS["pruned"] if row["direct"] > 0 else COLORS["dense"]
        figure.add_scatter(
            x=[row["layer"], target.layer], y=[y, 0.5], mode="lines", hoverinfo="skip",
            line={"color": color, "width": rounded(0.5 + 6 * abs(row["direct"]) / largest)},
        )  # fmt: skip
        exact = "" if row["exact"] != row["exact"] else f", patched {100 * row['exact']:.1f} %"
        figure.add_scatter(
            x=[row["layer"]], y=[y], mode="markers", marker={"color": color, "size": 9},
            hovertemplate=f"{row['writer']}: {100 * row['direct']:.1f} %{exact}<extra></extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=[target.layer], y=[0.5], mode="markers+text", text=[str(target)], textposition="middle right",
        marker={"color": _GREY, "size": 13}, hoverinfo="skip",
    )  # fmt: skip
    styled(
        figure, f"Who wrote what {target} inherits",
        f"Direct effects of the {len(table)} strongest of {len(upstream.writers)} writers on what the head inherited.",
        width=COLUMN, plot_height=260, legend=False,
    )  # fmt: skip
    figure.update_xaxes(title="layer", range=[-1.5, 1.2 * target.layer + 2], showgrid=False)
    figure.update_yaxes(tickvals=heights, ticktext=list(table["writer"]), range=[0, 1.05], showgrid=False)
    return figure


def _stack(figure: go.Figure, cause: str, places: Sequence[int | str], fractions: Sequence[float], column: int) -> None:
    name, color = _CAUSES[cause]
    place = "layer %{x}" if isinstance(places[0], int) else "%{x}"
    figure.add_bar(
        x=list(places), y=[rounded(100 * value) for value in fractions], name=name, marker={"color": color},
        hovertemplate=f"{place}<br>{name}: %{{y:.1f}} %<extra></extra>", row=1, col=column,
        legendgroup=name, showlegend=all(trace.name != name for trace in figure.data),
    )  # fmt: skip


def _stacked(figure: go.Figure, title: str) -> go.Figure:
    figure.update_layout(barmode="relative", bargap=0.1, legend={"y": 1.12})
    figure.update_annotations(font_size=12)
    figure.update_xaxes(title="layer")
    figure.update_yaxes(title=title, col=1)
    return figure
