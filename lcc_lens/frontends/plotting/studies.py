"""Studies over several models, tasks and seeds: which selector is right, which pruner loses least."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from lcc_lens.core.errors import RequestError
from lcc_lens.frontends.plotting.forest import Mark, Panel, forest
from lcc_lens.frontends.plotting.labels import GOLD, SELECTOR_LABELS
from lcc_lens.frontends.plotting.theme import COLORS, PAGE, SERIES, styled

_ROW = 40


def plot_selector_study(study: Mapping[str, Any], share: str | None = None) -> go.Figure:
    """How selectors rank heads beside activation patching, and what training the heads that they choose brings.

    Args:
        study: the content of ``benchmarks/selector_study.json``.
        share: the share of heads that was trained, such as ``25%``; the largest if not given.

    Raises:
        RequestError: the study trained no such share, or has more than four pruned models.
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
    correlation = [
        [_mark(found["correlation"].get(name), model, 1.0) for model, found in models.items()] for name in names
    ]
    itself = _with_itself(models)
    correlation[0] = [Mark(itself[model], model, note=" (on other examples)") for model in models]
    panels = [Panel("rank correlation with<br>activation patching", correlation)]
    for what, title in (
        ("recovered", "lost log-likelihood<br>recovered (%)"), ("kl_removed", "divergence from dense<br>removed (%)")
    ):  # fmt: skip
        marks = [
            [_mark(found["recovery"][share][name][what], model, 100.0) for model, found in models.items()]
            for name in names
        ]
        panels.append(Panel(title, marks))
    labels = [SELECTOR_LABELS[name] + (" (gold)" if name == GOLD else "") for name in names]
    figure = forest(labels, panels, looks)
    cells = study["cells"]
    tasks, seeds = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("task", "seed"))
    styled(
        figure, "Which heads to restore: selectors beside the gold standard",
        f"A constant per head trained on {share.replace('%', ' %')} of the heads. Means and 95 % t intervals over "
        f"{len(tasks)} tasks ({', '.join(tasks)}) x {len(seeds)} seeds. In the first panel activation patching is held "
        "against itself on other examples.",
        width=PAGE, plot_height=_ROW * len(names), above=30, below=62,
    )  # fmt: skip
    figure.update_layout(showlegend=True)
    return figure


def _with_itself(models: Mapping[str, Any]) -> dict[str, float | None]:
    """The gold standard's rank correlation with itself on other examples."""
    return {model: found["gold_with_itself"]["mean"] for model, found in models.items()}


def plot_pruning_quality(study: Mapping[str, Any]) -> go.Figure:
    """Perplexity after every pruner, with the standard deviation over seeds of calibration data.

    Args:
        study: the content of ``benchmarks/pruning_quality.json``.
    """
    methods = study["methods"]
    names = sorted(methods, key=lambda name: methods[name]["mean"])
    marks = []
    for name in names:
        found = methods[name]
        spread = found["stdev"] if found["n"] > 1 else None
        interval = None if spread is None else (max(found["mean"] - spread, 1.0), found["mean"] + spread)
        marks.append([Mark(found["mean"], "pruned", interval)])
    panel = Panel("perplexity (log scale)", marks, {"dense": study["dense"]["perplexity"]}, is_log=True)
    figure = forest([_pruner_label(name) for name in names], [panel], {"pruned": (COLORS["pruned"], "circle")})
    calibration = study["calibration"]
    counts = sorted({found["n"] for found in methods.values()})
    styled(
        figure, f"What pruning costs {study['model']}",
        f"Measured on {study['measured_on']}; calibrated on {calibration['n_samples']} sequences of "
        f"{calibration['seq_len']} tokens of {calibration['calibration']}. Bars: standard deviation over seeds "
        f"({counts[0]} to {counts[-1]} a row).",
        width=PAGE, plot_height=20 * len(names), above=30,
    )  # fmt: skip
    figure.update_xaxes(tickvals=[30, 100, 1000, 10_000, 100_000], ticktext=["30", "100", "1,000", "10,000", "100,000"])
    return figure


def _pruner_label(name: str) -> str:
    for plain, written in (("wanda", "Wanda"), ("sparsegpt", "SparseGPT"), ("slimgpt", "SlimGPT"), ("%", " %")):
        name = name.replace(plain, written)
    return name.replace("smallest heads", "smallest weights, sliced").replace("random heads", "random, sliced")


def _mark(found: Mapping[str, Any] | None, kind: str, scale: float) -> Mark:
    if found is None:
        return Mark(None, kind)
    interval = None if found["low"] is None else (scale * found["low"], scale * found["high"])
    return Mark(scale * found["mean"], kind, interval)
