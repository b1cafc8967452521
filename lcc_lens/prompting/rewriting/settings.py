"""Settings of a rewriter's training: MePO's by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from lcc_lens.core.ranges import Count, Length, Positive, Range, Rate, Seed, check_numbers

#: Tokens of a request with its answer, where the model reads as many.
LONGEST = 2048


@dataclass(frozen=True)
class RewriterSettings:
    """Settings of direct preference optimisation, checked; the defaults are MePO's (arXiv 2505.09930).

    A small model barely moves at MePO's learning rate: raise ``lr`` to 1e-4 for SmolLM2.
    """

    rank: Count = 8
    """Rank of the adapter on the query and value projections."""
    alpha: Count = 16
    """The adapter is scaled by alpha / rank."""
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.05
    """Dropout of the adapter's inputs in training."""
    beta: Positive = 0.01
    """How far the rewriter may move from its model; smaller is farther."""
    lr: Rate = 1e-6
    """Learning rate, with linear decay."""
    epochs: Count = 3
    """Passes over the pairs."""
    steps: Count | None = None
    """Optimiser steps in place of epochs; pairs repeat until there are enough."""
    batch_size: Count = 4
    """Pairs of a step."""
    max_length: Length | None = None
    """Tokens of a request with its answer at most (2048, or the model's context); longer pairs are left out."""
    seed: Seed = 0
    """Of the adapter, the order of the pairs and the split."""

    def __post_init__(self) -> None:
        check_numbers(self)
