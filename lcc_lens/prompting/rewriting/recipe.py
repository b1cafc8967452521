"""Recipes of rewriters at a paper's size, read from JSON."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lcc_lens.core.ranges import Count, check_numbers
from lcc_lens.core.reading import read_json
from lcc_lens.prompting.rewriting.preferences import Target
from lcc_lens.prompting.rewriting.settings import RewriterSettings


@dataclass(frozen=True)
class RewriterRecipe:
    """How a rewriter is made: what is preferred by which model, and how it is trained.

    ``status`` says whether it has ever been run with ``model``.
    """

    title: str
    paper: str
    status: str
    note: str
    model: str
    target: Target
    data: str
    examples: Count
    candidates: Count
    version_tokens: Count
    training: RewriterSettings

    def __post_init__(self) -> None:
        check_numbers(self)

    def dry(self) -> RewriterRecipe:
        """The same with as little data as its steps take, to try whether they run; the result means nothing."""
        training = replace(self.training, steps=2, batch_size=2)
        return replace(self, examples=40, candidates=2, version_tokens=8, training=training)


def read_rewriter_recipe(path: str | Path) -> RewriterRecipe:
    """Read a recipe.

    Raises:
        RequestError: no such file, an unknown or missing key, or a value of another type; names the place.
    """
    return read_json(Path(path), RewriterRecipe, "correct it", closed=True)
