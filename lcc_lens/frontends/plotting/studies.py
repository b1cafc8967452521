"""Figures of studies over several models, tasks and seeds: selectors, pruners and prompts compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

import plotly.graph_objects as go

from lcc_lens.core.errors import RequestError
from lcc_lens.core.ranges import ranged
from lcc_lens.frontends.plotting.forest import Mark, Panel, forest
from lcc_lens.frontends.plotting.labels import GOLD, SELECTOR_LABELS
from lcc_lens.frontends.plotting.theme import (
    COLORS,
    PAGE,
    SEQUENTIAL,
    SERIES,
    error_bars,
    label_places,
    rounded,
    styled,
)
from lcc_lens.prompting.study import PromptStudy

_ROW = 40


def plot_selector_study(study: Mapping[str, Any], share: str | None = None) -> go.Figure:
    """Rank correlation of selectors with activation patching, and the recovery from training the heads they choose.

    Args:
        study: the content of ``benchmarks/selector_study.json``.
        share: the share of heads that was trained, such as ``25%``; the largest if not given.

    Raises:
        RequestError: the study did not train this share, or has more than four pruned models.
    """
    models = study["summary"]
    shares = list(next(iter(models.values()))["recovery"])
    share = share or max(shares, key=lambda s: float(s.rstrip("%")))
    if share not in shares:
        raise RequestError(f"expected one of the shares {', '.join(shares)}, got {share!r}")
    if len(models) > len(SERIES):
        raise RequestError(f"expected at most {len(SERIES)} pruned models, got {len(models)}; draw some of them")
    looks = dict(zip(models, SERIES, strict=False))
    names = list(SELECTOR_LABELS)
    correlation = [[_mark(row["correlation"].get(name), model) for model, row in models.items()] for name in names]
    correlation[0] = [
        Mark(row["gold_with_itself"]["mean"], model, note=" (on other examples)") for model, row in models.items()
    ]
    panels = [Panel("rank correlation with<br>activation patching", correlation)]
    for what, title in (
        ("recovered", "lost log-likelihood<br>recovered (%)"), ("kl_removed", "divergence from dense<br>removed (%)")
    ):  # fmt: skip
        marks = [
            [_mark(row["recovery"][share][name][what], model, 100.0) for model, row in models.items()] for name in names
        ]
        panels.append(Panel(title, marks))
    labels = [SELECTOR_LABELS[name] + (" (gold)" if name == GOLD else "") for name in names]
    tasks, seeds = (list(dict.fromkeys(run[key] for run in study["cells"])) for key in ("task", "seed"))
    caption = (
        f"A constant per head trained on {share.replace('%', ' %')} of the heads. Means and 95 % t intervals over "
        f"{len(tasks)} tasks ({', '.join(tasks)}) x {len(seeds)} seeds. In the first panel activation patching is held "
        "against itself on other examples."
    )
    title = "Which heads to restore: selectors beside the gold standard"
    return forest(labels, panels, looks, title=title, caption=caption, plot_height=_ROW * len(names), legend=True)


def plot_pruning_quality(study: Mapping[str, Any]) -> go.Figure:
    """Perplexity after every pruner, with the standard deviation over calibration seeds.

    Args:
        study: the content of ``benchmarks/pruning_quality.json``.
    """
    methods = study["methods"]
    names = sorted(methods, key=lambda name: methods[name]["mean"])
    marks = []
    for row in (methods[name] for name in names):
        mean, spread = row["mean"], row["stdev"] if row["n"] > 1 else None
        interval = None if spread is None else (max(mean - spread, 1.0), mean + spread)
        marks.append([Mark(mean, "pruned", interval)])
    panel = Panel("perplexity (log scale)", marks, {"dense": study["dense"]["perplexity"]}, is_log=True)
    calibration, counts = study["calibration"], sorted({row["n"] for row in methods.values()})
    caption = (
        f"Measured on {study['measured_on']}; calibrated on {calibration['n_samples']} sequences of "
        f"{calibration['seq_len']} tokens of {calibration['calibration']}. Bars: standard deviation over seeds "
        f"({counts[0]} to {counts[-1]} a row)."
    )
    figure = forest(
        [_pruner_label(name) for name in names], [panel], {"pruned": (COLORS["pruned"], "circle")},
        title=f"What pruning costs {study['model']}", caption=caption, plot_height=20 * len(names), below=52,
    )  # fmt: skip
    figure.update_xaxes(tickvals=[30, 100, 1000, 10_000, 100_000], ticktext=["30", "100", "1,000", "10,000", "100,000"])
    return figure


@ranged
def plot_prompt_study(study: PromptStudy) -> go.Figure:
    """Every variant's gain on the dense model against its gain on the pruned one; the colour is its length in words.

    Above the diagonal a prompt helps the pruned model more than the dense one, so it recovers something.

    Args:
        study: see :func:`lcc_lens.prompting.measuring.prompt_study`.

    Raises:
        RequestError: no variant beside the raw prompt.
    """
    return plot_prompt_gains(study.table().to_dict("records"), len(study.record.groups), study.record.data)


def plot_prompt_gains(table: Sequence[Mapping[str, Any]], n_responses: int, data: str) -> go.Figure:
    """The same from the rows of the study's table."""
    rows = [row for row in table if row["variant"] != "raw"]
    if not rows:
        raise RequestError("expected variants beside the raw prompt to draw, got none; measure some")
    gains = {model: [row[f"gain_{model}"] for row in rows] for model in ("dense", "pruned")}
    bars = {
        model: error_bars(gains[model], [_interval(row, model) for row in rows]) | {"color": "#b5b5b5"}
        for model in gains
    }
    ends = [end for model in gains for row in rows for end in (row[f"gain_{model}"], *_interval(row, model))]
    low, high = (float(edge(0.0, *(end for end in ends if end is not None))) for edge in (min, max))
    corners, margin = [rounded(low), rounded(high)], 0.06 * (high - low)  # with room for labels beside the points
    figure = go.Figure()
    figure.add_scatter(x=corners, y=corners, mode="lines", line={"color": "#9a9a9a", "dash": "dash"}, hoverinfo="skip")
    span = high - low + 2 * margin or 1.0
    x, y = ([(value - low + margin) / span for value in gains[model]] for model in ("dense", "pruned"))
    places = label_places(x, y, [row["variant"] for row in rows], width=660, height=430)
    words = [rounded(row["words"]) for row in rows]
    figure.add_scatter(
        x=[rounded(value) for value in gains["dense"]], y=[rounded(value) for value in gains["pruned"]],
        error_x=bars["dense"], error_y=bars["pruned"], mode="markers+text", text=[row["variant"] for row in rows],
        textposition=places, marker={
            "size": 11, "color": words, "colorscale": SEQUENTIAL, "colorbar": {"title": "words"},
            "line": {"color": "#4d4d4d", "width": 1},
        },
    )  # fmt: skip
    caption = (
        f"{n_responses} responses of {data}; bars are paired 95 % bootstrap intervals over "
        "examples. On the dashed line a prompt helps both models alike."
    )
    styled(figure, "What a prompt gives, dense and pruned", caption, width=PAGE, plot_height=430, legend=False)
    figure.update_xaxes(title="gain on the dense model (nats per token)", range=[low - margin, high + margin])
    figure.update_yaxes(title="gain on the pruned model (nats per token)")
    return figure


def _interval(row: Mapping[str, Any], model: str) -> list[float | None]:
    """The interval of a model's gain; a single example has none."""
    return [None if isnan(row[f"gain_{model}_{end}"]) else row[f"gain_{model}_{end}"] for end in ("low", "high")]


def _pruner_label(name: str) -> str:
    for plain, proper in (("wanda", "Wanda"), ("sparsegpt", "SparseGPT"), ("slimgpt", "SlimGPT"), ("%", " %")):
        name = name.replace(plain, proper)
    return name.replace("smallest heads", "smallest weights, sliced").replace("random heads", "random, sliced")


def _mark(estimate: Mapping[str, Any] | None, kind: str, scale: float = 1.0) -> Mark:
    if estimate is None:
        return Mark(None, kind)
    interval = None if estimate["low"] is None else (scale * estimate["low"], scale * estimate["high"])
    return Mark(scale * estimate["mean"], kind, interval)
