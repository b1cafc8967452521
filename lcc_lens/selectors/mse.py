"""The simplest informed selector: heads whose output pruning moved most."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def score_mse(
    squared_difference: Float[Tensor, "layer head"], n_samples: int, d_head: int
) -> Float[Tensor, "layer head"]:
    r"""The mean squared difference per head, $\frac{1}{N d_{head}} \sum_n |z_{dense} - z_{pruned}|^2$.

    Reference: the "heads by MSE" ablation of RestoreLCC (arXiv 2510.21834).
    """
    return squared_difference / (n_samples * d_head)
