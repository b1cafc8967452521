"""Run a recipe of the paper's tables: prune once, then compare on every data set; an interrupted run resumes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcc_lens.core.config import package_version
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import write_json, write_text
from lcc_lens.core.machine.cluster import Cluster
from lcc_lens.core.outputs.folders import require_free
from lcc_lens.core.ranges import Count, ranged
from lcc_lens.core.reading import read_json
from lcc_lens.core.showing import Record
from lcc_lens.evaluation.comparison.accuracies import mean_accuracy
from lcc_lens.evaluation.comparison.cluster import compare_on_cluster
from lcc_lens.evaluation.comparison.compare import check_comparison, compare
from lcc_lens.evaluation.comparison.entry import Entry
from lcc_lens.evaluation.comparison.tables import result_facts, results_table
from lcc_lens.evaluation.paper.recipes import PaperRecipe, dry
from lcc_lens.evaluation.paper.tables import recipe_table
from lcc_lens.pruning.jobs import prune

if TYPE_CHECKING:
    import pandas as pd

RECIPE_SETTINGS, RECIPE_RESULTS, RECIPE_TABLE = "recipe.json", "results.json", "table.md"


class RecipeResults(Record):
    """The contents of a recipe's ``results.json``: a comparison per data set."""

    def table(self) -> pd.DataFrame:
        """The rows of every comparison (see :func:`~lcc_lens.evaluation.comparison.tables.results_table`), by data."""
        import pandas as pd

        parts = {data: results_table(part["bare"], part["rows"]) for data, part in self["comparisons"].items()}
        return pd.concat(parts, names=["data"]).reset_index("data").reset_index(drop=True)

    def _facts(self) -> dict[str, Any]:
        return {
            f"{data}: {name}": line
            for data, part in self["comparisons"].items()
            for name, line in result_facts(part["bare"], part["rows"]).items()
        }


@ranged
def run_recipe(
    recipe: PaperRecipe,
    out: str | Path,
    *,
    model: str | None = None,
    seeds: Count | None = None,
    examples: Count | None = None,
    limit: Count | None = None,
    dry_run: str | Path | None = None,
    cluster: Cluster | None = None,
    on_cell: Callable[[str, dict[str, Any]], None] | None = None,
) -> RecipeResults:
    """Prune, compare on every data set, and write ``results.json`` and ``table.md`` as they come.

    Args:
        recipe: as read by :func:`~lcc_lens.evaluation.paper.recipes.read_recipe`.
        out: a folder, in which the same call resumes. The pruned model is in ``pruned``, each comparison in a folder
            named after its data.
        model: another model than the recipe's.
        seeds: another number of seeds.
        examples: another number of training examples.
        limit: items of each task at most.
        dry_run: a tiny model to try every step on with little data; the results mean nothing.
        cluster: where every run of the comparisons is a job; the pruning is done here.
        on_cell: called with the name and results of every new run that is computed here.

    Raises:
        RequestError: data are missing, or the folder is another recipe's; nothing is written.
        InterruptedRun: Ctrl-C; finished runs are kept.

    Example:
        >>> run_recipe(read_recipe("recipes/unstructured50.json"), "runs/unstructured50")  # doctest: +SKIP
    """
    recipe, out = _changed(recipe, model, seeds, examples, limit, dry_run), Path(out)
    for data in recipe.data:
        check_comparison([Entry.parse(text) for text in recipe.entries], recipe.comparison(data), seeds=recipe.seeds)
    if cluster is not None:
        cluster.check()
    _settle(out, {**asdict(recipe), "dry_run": dry_run is not None})
    pruned = out / "pruned"
    if not pruned.exists():
        prune(recipe.model, pruned, **asdict(recipe.prune))
    results = RecipeResults(
        title=recipe.title, paper=recipe.paper, model=recipe.model, dry_run=dry_run is not None,
        version=package_version(), comparisons={},
    )  # fmt: skip
    for data in recipe.data:
        run = (recipe.model, pruned, out / data, recipe.entries)
        settings: dict[str, Any] = {"seeds": recipe.seeds, "config": recipe.comparison(data)}
        if cluster is None:
            compared = compare(*run, **settings, on_cell=on_cell)
        else:
            compared = compare_on_cluster(*run, **settings, cluster=cluster)
        results["comparisons"][data] = {"bare": _unrestored(compared["bare"]), "rows": compared["summary"]}
        write_json(out / RECIPE_RESULTS, results)
        write_text(out / RECIPE_TABLE, recipe_table(recipe, results))
    return results


def _changed(
    recipe: PaperRecipe,
    model: str | None,
    seeds: int | None,
    examples: int | None,
    limit: int | None,
    dry_run: str | Path | None,
) -> PaperRecipe:
    """The recipe with the caller's settings in place of its own."""
    if dry_run is not None:
        if model is not None:
            raise RequestError(f"expected one model, got {model} and the dry run's {dry_run}; leave one out")
        recipe, model = dry(recipe), str(dry_run)
    config = replace(
        recipe.compare, examples=examples or recipe.compare.examples, limit=limit or recipe.compare.limit
    )  # fmt: skip
    return replace(recipe, model=model or recipe.model, seeds=seeds or recipe.seeds, compare=config)


def _settle(out: Path, settings: dict[str, Any]) -> None:
    """Write the recipe's settings, or refuse a folder with other settings."""
    file = out / RECIPE_SETTINGS
    written = json.loads(json.dumps(settings))  # lists for tuples, as in the file
    rest = {key: value for key, value in written.items() if key not in ("rows", "note", "status")}
    if not file.exists():
        require_free(out, overwrite=False)
        write_json(file, rest)
    elif read_json(file, dict[str, Any]) != rest:
        raise RequestError(f"expected a folder of the same recipe, got other settings in {out}; name another folder")


def _unrestored(models: dict[str, Any]) -> dict[str, Any]:
    """The dense and the pruned model's figures, without those of single blocks and items."""
    return {
        name: {
            "perplexity": model["perplexity"],
            "accuracy": mean_accuracy(model["tasks"])[0],
            "accuracy_stderr": mean_accuracy(model["tasks"])[1],
            "tasks": {
                task: {key: value for key, value in scores.items() if key != "items"}
                for task, scores in model["tasks"].items()
            },
        }
        for name, model in models.items()
    }
