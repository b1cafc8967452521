"""A Markdown table of the paper's figures beside ours for every recipe."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from lcc_lens.core.text import code, markdown
from lcc_lens.evaluation.formatting import number, with_spread
from lcc_lens.evaluation.paper.recipes import UNRESTORED, PaperRecipe, PaperRow

Results = Mapping[str, Any]


def recipe_table(recipe: PaperRecipe, results: Results | None = None) -> str:
    """A recipe's table as Markdown: mean accuracy and perplexity, the paper's and ours; empty if not measured.

    Accuracies are in per cent. Ours are means over seeds with their standard deviation, of task-specific recovery over
    tasks, each trained and measured on its own.
    """
    lines = [f"## {markdown(recipe.title)}", "", _status(recipe, results), "", markdown(recipe.note), ""]
    tasks = recipe.data if recipe.is_of_tasks else recipe.compare.tasks
    heads = ["accuracy, paper", "ours", "perplexity, paper", "ours", *map(markdown, tasks)]
    lines += ["| | " + " | ".join(heads) + " |", "|---|" + len(heads) * "---:|"]
    for row in recipe.rows:
        ours = _ours(recipe, row, results)
        cells = [number(row.accuracy), ours["accuracy"], number(row.perplexity), ours["perplexity"]]
        cells += [ours["tasks"].get(task, "") for task in tasks]
        lines.append(f"| {markdown(row.name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _status(recipe: PaperRecipe, results: Results | None) -> str:
    where = f"{markdown(recipe.paper)}; {code(recipe.model)}, {recipe.seeds} seeds."
    if results is None:
        return f"*{markdown(recipe.status.capitalize())}.* {where}"
    if results["dry_run"]:
        return f"*A dry run on {markdown(results['model'])}: its figures mean nothing.* {where}"
    return f"*Run on {markdown(results['model'])} (lcc_lens {results['version']}).* {where}"


def _ours(recipe: PaperRecipe, row: PaperRow, results: Results | None) -> dict[str, Any]:
    """Our figures for a row as text, over all comparisons that have it."""
    found = (
        [] if results is None or row.entry is None else [_row(c, row.entry) for c in results["comparisons"].values()]
    )
    done = [measured for measured in found if measured is not None]
    tasks = {task: f"{100 * scores['acc']:.1f}" for measured in done for task, scores in measured["tasks"].items()}
    if not done or len(done) < len(recipe.data):  # a mean over fewer tasks is no mean of them all
        return {"accuracy": "", "perplexity": "", "tasks": tasks}
    return {"accuracy": _mean(done, "accuracy", 100.0), "perplexity": _mean(done, "perplexity", 1.0), "tasks": tasks}


def _row(comparison: Mapping[str, Any], entry: str) -> Mapping[str, Any] | None:
    if entry in UNRESTORED:
        unrestored: Mapping[str, Any] | None = comparison["bare"].get(entry)
        return unrestored
    return next((row for row in comparison["rows"] if row["entry"] == entry and row["seeds"]), None)


def _mean(rows: list[Mapping[str, Any]], key: str, scale: float) -> str:
    value = scale * statistics.mean(row[key] for row in rows)
    spread = rows[0].get(f"{key}_sd") if len(rows) == 1 else None
    return with_spread(value, None if spread is None else scale * spread)
