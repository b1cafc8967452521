"""The table of an evaluation for the page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcc_lens.core.reading import read_json, reading
from lcc_lens.evaluation.evaluate import format_scores

_AGAIN = "evaluate again"


@dataclass(frozen=True)
class _Scores:
    tasks: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class _Results:
    models: dict[str, _Scores]
    share_recovered: dict[str, float | None] | None = None


def results_table(path: Path) -> dict[str, Any]:
    """Columns and rows of a ``results.json``, and the recovered shares if it has any.

    Raises:
        RequestError: the file is missing or has another layout.
    """
    results = read_json(path, _Results, _AGAIN)
    with reading(path, _AGAIN):
        rows = {name: format_scores(scores.tasks) for name, scores in results.models.items()}
    shares = results.share_recovered or {}
    recovered = [f"{100 * share:.0f} % on {name}" for name, share in shares.items() if share is not None]
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    return {
        "columns": columns,
        "rows": [
            {"name": name, "cells": [cells.get(column, "") for column in columns]} for name, cells in rows.items()
        ],
        "recovered": recovered,
    }
