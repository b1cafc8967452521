"""Figure of an efficiency report: zeros, sizes and times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from lcc_lens.frontends.plotting.forest import Mark, Panel, forest
from lcc_lens.frontends.plotting.theme import SERIES

_LOOKS = {"as stored": ("#4d4d4d", "circle"), "compressed (zstd)": SERIES[1]}


def plot_report(report: Mapping[str, Any]) -> go.Figure:
    """Zeros and their pattern, size on disk, and latency relative to the first model.

    Args:
        report: what :func:`lcc_lens.evaluation.efficiency.report.report` returns, or ``report.json``.
    """
    models, ratios = report["models"], report["ratios"]
    whole, zstd = _LOOKS
    zeros = [[Mark(100 * entry["sparsity"], whole, _matrix_range(entry))] for entry in models.values()]
    sizes = [[Mark(e["bytes"] / 1e6, whole), Mark(e["bytes_zstd"] / 1e6, zstd)] for e in models.values()]
    panels = [Panel("zeros (%)", zeros), Panel("weights on disk<br>(MB)", sizes)]
    if ratios:
        for job in ("prefill", "decode"):
            times = [ratios[name][job] for name in models]
            marks = [[Mark(time["median"], whole, (time["low"], time["high"]))] for time in times]
            panels.append(Panel(f"{job} time<br>(x the first model's)", marks, {"the first model": 1.0}))
    labels = [f"{name} ({entry['pattern']})" for name, entry in models.items()]
    return forest(labels, panels, _LOOKS, title="Sparse, small, fast? What each model is", caption=_caption(report),
                  plot_height=34 * len(models) + 10, legend=True)  # fmt: skip


def _matrix_range(entry: Mapping[str, Any]) -> tuple[float, float] | None:
    """Share of zeros in percent of the matrices with the fewest and the most."""
    shares = [100 * matrix["sparsity"] for matrix in entry.get("matrices", {}).values()]
    return (min(shares), max(shares)) if shares else None


def _caption(report: Mapping[str, Any]) -> str:
    settings, machine = report["settings"], report["machine"]
    parts = ["Zeros of the linear layers; bars from the matrix with the fewest to the one with the most."]
    if report["ratios"]:
        parts.append(
            f"Times: medians with 95 % intervals over {settings['repeats']} interleaved rounds; prefill of "
            f"{settings['prompt_tokens']} tokens, decoding of {settings['new_tokens']}, on {machine['device']} with "
            f"{machine['threads']} threads in {machine['dtype']}."
        )
    patterns = report["zero_patterns"]
    for name, pattern in patterns["models"].items():
        if "is_equal" in pattern:
            same = "the same zeros as" if pattern["is_equal"] else "other zeros than"
            parts.append(f"{name} has {same} {patterns['reference']}.")
    return " ".join(parts)
