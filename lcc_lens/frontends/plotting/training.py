"""Figure of a training run."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from lcc_lens.frontends.plotting.theme import COLORS, COLUMN, rounded, styled
from lcc_lens.restoration.training.config import Step


def plot_training(
    steps: Sequence[Step], dense_loss: float | None = None, pruned_loss: float | None = None, caption: str = ""
) -> go.Figure:
    """Training and held-out loss per optimiser step, with the held-out loss of the dense and the pruned model.

    Args:
        steps: records of a run.
        dense_loss: held-out loss of the dense model, nats per response token.
        pruned_loss: held-out loss of the pruned model.
        caption: method, data and seed.
    """
    validated = [step for step in steps if step.validation_loss is not None]
    figure = go.Figure()
    figure.add_scatter(
        x=[s.step for s in steps], y=[rounded(s.loss) for s in steps], name="training batches", mode="lines",
        line={"color": "#9a9a9a", "width": 1},
    )  # fmt: skip
    figure.add_scatter(
        x=[s.step for s in validated], y=[rounded(s.validation_loss) for s in validated], name="restored, held-out",
        mode="lines+markers", line={"color": COLORS["restored"], "width": 2},
    )  # fmt: skip
    for name, value in (("pruned", pruned_loss), ("dense", dense_loss)):
        if value is not None:
            figure.add_scatter(  # named in the legend: a label would lie on the curves
                x=[1, len(steps)], y=[rounded(value)] * 2, name=name, mode="lines",
                line={"color": COLORS[name], "dash": "dash"},
            )  # fmt: skip
    caption = f"{len(steps)} optimiser steps. {caption}".strip()
    styled(figure, "Restoring", caption, width=COLUMN, plot_height=230, above=50)
    figure.update_xaxes(title="optimiser step")
    figure.update_yaxes(title="loss (nats per response token)")
    return figure
