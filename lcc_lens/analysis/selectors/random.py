"""Random selector: heads in random order, the control for all others."""

from __future__ import annotations

import math

import torch

from lcc_lens.analysis.head_scores import HeadScores


def score_random(n_layers: int, n_heads: int, seed: int) -> HeadScores:
    """Uniform random scores, the same for the same seed; the standard error is that of the draw itself."""
    value = torch.rand(n_layers, n_heads, generator=torch.Generator().manual_seed(seed))
    return HeadScores("random", value, torch.full_like(value, 1 / math.sqrt(12)), 0, {"seed": seed})
