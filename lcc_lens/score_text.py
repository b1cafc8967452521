"""Scores of models as text: a column and a value for each task."""

from __future__ import annotations

from typing import Any


def format_scores(tasks: dict[str, Any]) -> dict[str, str]:
    """Column title to text for one model's scores: perplexity, response loss, accuracy with standard error."""
    columns: dict[str, str] = {}
    for name, scores in tasks.items():
        if "perplexity" in scores:
            columns[f"{name}: perplexity"] = f"{scores['perplexity']:.2f}"
        elif "response_loss" in scores:
            columns[f"{name}: loss"] = f"{scores['response_loss']:.3f}"
        else:
            columns[f"{name}: accuracy (n = {scores['n']})"] = (
                f"{100 * scores['acc']:.1f} ± {100 * scores['stderr']:.1f} %"
            )
    return columns
