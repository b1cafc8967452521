"""A selector's score of every head, with its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.core.metrics import standard_error
from lcc_lens.core.showing import Shown

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class HeadScores(Shown):
    """One score per head, higher for heads to restore first, each with a standard error.

    ``stderr`` is the standard error over examples, in the score's unit; NaN if the data do not determine it (a single
    example). ``settings`` are the selector's, as JSON values.
    """

    selector: str
    value: Float[Tensor, "layer head"]
    stderr: Float[Tensor, "layer head"]
    n_examples: int
    settings: dict[str, Any] = field(default_factory=dict)

    def table(self) -> pd.DataFrame:
        """One row per head: layer, head, value, stderr."""
        import pandas as pd

        rows = [
            (layer, head, value, error)
            for layer, parts in enumerate(zip(self.value.tolist(), self.stderr.tolist(), strict=True))
            for head, (value, error) in enumerate(zip(*parts, strict=True))
        ]
        return pd.DataFrame(rows, columns=["layer", "head", "value", "stderr"])

    @classmethod
    def from_examples(
        cls, selector: str, scores: Float[Tensor, "example layer head"], settings: dict[str, Any] | None = None
    ) -> HeadScores:
        """The mean over examples and its standard error."""
        scores = scores.double()
        stderr = standard_error(scores)
        return cls(selector, scores.mean(0).float().cpu(), stderr.float().cpu(), len(scores), settings or {})

    def interval(self, level: float = 0.95) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"]]:
        """The lower and upper bound of every score's normal confidence interval."""
        half = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor((1 + level) / 2)) * self.stderr
        return self.value - half, self.value + half

    def rank_correlation(self, other: HeadScores) -> float:
        """Spearman's rank correlation with another selector's scores over all heads; NaN if either is constant."""
        first, second = (_ranks(scores.value.flatten().double()) for scores in (self, other))
        return float(torch.corrcoef(torch.stack([first, second]))[0, 1])


def _ranks(values: Float[Tensor, " head"]) -> Float[Tensor, " head"]:
    """Ranks from 0; equal values share the mean of their ranks."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = last - (counts + 1) / 2
    return ranks[inverse]
