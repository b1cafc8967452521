"""The control for every selector: heads in random order."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def score_random(n_layers: int, n_heads: int, seed: int) -> Float[Tensor, "layer head"]:
    """Uniform random scores, the same for the same seed."""
    return torch.rand(n_layers, n_heads, generator=torch.Generator().manual_seed(seed))
