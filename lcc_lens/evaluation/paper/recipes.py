"""Recipes of the paper's tables, read from JSON: what to prune, what to compare, and the paper's figures."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lcc_lens.core.errors import RequestError
from lcc_lens.core.ranges import Count, Length, Seed, Sparsity, check_numbers, ranged
from lcc_lens.core.reading import read_json
from lcc_lens.evaluation.comparison.config import CompareConfig
from lcc_lens.evaluation.comparison.entry import Entry
from lcc_lens.models.architecture.sparsity_patterns import Unstructured, parse_pattern
from lcc_lens.pruning.methods.settings import PruneConfig

Status = Literal["not run at size", "run at size"]
#: Rows of a table that need no training.
UNRESTORED = ("dense", "pruned")


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's table: its name there, our entry for it, and the paper's figures.

    ``entry`` is ``dense``, ``pruned`` or an entry of a comparison (see
    :class:`~lcc_lens.evaluation.comparison.entry.Entry`); None if the recipe leaves the row out. ``accuracy`` is the
    mean over tasks in per cent. Accuracy and perplexity are None if the paper has no such row.
    """

    name: str
    entry: str | None
    accuracy: float | None = None
    perplexity: float | None = None


@dataclass(frozen=True)
class PruneStep:
    """How a recipe prunes; see :func:`~lcc_lens.pruning.jobs.prune`."""

    method: str
    sparsity: Sparsity | None = None
    pattern: str | None = None
    calibration: str = "c4"
    n_samples: Count = 128
    seq_len: Length = 2048
    seed: Seed = 0
    sliced: bool = False

    def __post_init__(self) -> None:
        check_numbers(self)
        if (self.sparsity is None) == (self.pattern is None):
            raise RequestError(
                f"expected a sparsity or a pattern to prune to, got {self.sparsity} and {self.pattern}; name one"
            )
        pattern = Unstructured(self.sparsity or 0.0) if self.pattern is None else parse_pattern(self.pattern)
        PruneConfig(self.method, pattern, sliced=self.sliced)  # refuses settings that contradict each other


@dataclass(frozen=True)
class PaperRecipe:
    """A group of rows of the paper's tables and how to reproduce them.

    ``data`` are the sets that restorations train on, with one comparison for each. ``compare`` are the settings that
    these share; without ``tasks`` each comparison measures the task that it trains on. ``status`` says whether the
    recipe has ever been run with ``model``.
    """

    title: str
    paper: str
    status: Status
    note: str
    model: str
    prune: PruneStep
    data: tuple[str, ...]
    seeds: int
    rows: tuple[PaperRow, ...]
    compare: CompareConfig = field(default_factory=CompareConfig)

    def __post_init__(self) -> None:
        if not self.data or self.seeds < 1 or not self.entries:
            raise RequestError(f"expected data, a seed and a row to train in {self.title!r}, got none; add some")
        for entry in self.entries:
            Entry.parse(entry)

    @property
    def entries(self) -> tuple[str, ...]:
        """The entries of the comparison."""
        return tuple(dict.fromkeys(row.entry for row in self.rows if row.entry and row.entry not in UNRESTORED))

    @property
    def is_of_tasks(self) -> bool:
        """Whether each comparison measures the task that it trains on."""
        return not self.compare.tasks

    def comparison(self, data: str) -> CompareConfig:
        """The settings of the comparison that trains on one data set."""
        return replace(self.compare, data=data, tasks=self.compare.tasks or (data,))


@ranged
def read_recipe(path: str | Path) -> PaperRecipe:
    """Read a recipe.

    Raises:
        RequestError: no such file, an unknown or missing key, or a value of another type; names the place.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"expected a recipe, got {path}, which is no file; name one of recipes/*.json")
    return read_json(path, PaperRecipe, "correct it", closed=True)


def dry(recipe: PaperRecipe) -> PaperRecipe:
    """The same recipe with as little data as its steps take, to try whether they run; the results mean nothing."""
    config = replace(
        recipe.compare, examples=8, validation=2, responses=2, blocks=2, block_length=32, limit=4, max_length=384,
        scan_examples=16, batch_size=8, epochs=1, low_rank=2, lora_rank=2, refit_samples=3,
        speed_rounds=2,
    )  # fmt: skip
    return replace(recipe, prune=replace(recipe.prune, n_samples=16, seq_len=64), seeds=1, compare=config)
