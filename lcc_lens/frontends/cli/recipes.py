"""The subcommand recipe: a group of rows of the paper's tables as one job."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from lcc_lens.core.ranges import Count
from lcc_lens.frontends.cli.options import ClusterJobs, Maybe, Tabled
from lcc_lens.frontends.cli.show import console


@dataclass(frozen=True, kw_only=True)
class Recipe(Tabled):
    """Prune, restore by every method and measure as a recipe says; the same command resumes where it stopped."""

    example: ClassVar[str] = "recipes/unstructured50.json --out runs/unstructured50"

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RECIPE")]
    """One of recipes/*.json, or your own."""
    table: Annotated[Maybe[Path], tyro.conf.arg(metavar="TABLE")] = None
    """Also write the rows of all comparisons to this file, .csv or .json."""
    out: Maybe[Path] = None
    """Where everything is written (runs/ and the recipe's name, if not given)."""
    model: Maybe[str] = None
    """Another model than the recipe's."""
    seeds: Maybe[Count] = None
    """Another number of seeds."""
    examples: Maybe[Count] = None
    """Another number of training examples."""
    limit: Maybe[Count] = None
    """Items of each task at most."""
    dry_run: Maybe[str] = None
    """A tiny model to run every step on, with hardly any data; checks that it runs, the results mean nothing."""
    jobs: ClusterJobs = field(default_factory=ClusterJobs)

    def execute(self) -> None:
        from lcc_lens.evaluation.comparison.compare import require_a_measured_run
        from lcc_lens.evaluation.comparison.tables import failures
        from lcc_lens.evaluation.paper.recipes import read_recipe
        from lcc_lens.evaluation.paper.run import RECIPE_TABLE, run_recipe

        recipe, out = read_recipe(self.file), self.out or Path("runs") / self.file.stem
        results = run_recipe(
            recipe, out, model=self.model, seeds=self.seeds, examples=self.examples, limit=self.limit,
            dry_run=self.dry_run, cluster=self.jobs.chosen(),
        )  # fmt: skip
        console().print((out / RECIPE_TABLE).read_text(encoding="utf-8"), soft_wrap=True)
        for comparison in results["comparisons"].values():
            for line in failures(comparison["rows"]):
                console().print(line, soft_wrap=True)
        self.write(results.table)
        console().print(f"table {out / RECIPE_TABLE}", soft_wrap=True)
        require_a_measured_run([row for comparison in results["comparisons"].values() for row in comparison["rows"]])
