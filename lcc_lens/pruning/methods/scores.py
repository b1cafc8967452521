"""Importance scores of single weights: the lowest are pruned first."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def magnitude_score(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    r"""Score weights by magnitude, $S_{ij} = |W_{ij}|$.

    Needs no data. Prefer `wanda_score` for language models, where a few very large input features make small weights
    matter.

    Args:
        weight: weight of a linear layer, one row per output.

    Returns:
        Scores in the weight's own format.

    Example:
        >>> import torch
        >>> magnitude_score(torch.tensor([[-2.0, 1.0]]))
        tensor([[2., 1.]])
    """
    return weight.abs()


def wanda_score(weight: Float[Tensor, "out in"], input_norm: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    r"""Score weights by magnitude times the norm of their input feature, $S_{ij} = |W_{ij}| \cdot \lVert X_j \rVert_2$.

    Args:
        weight: weight of a linear layer, one row per output.
        input_norm: l2 norm of each input feature over all calibration tokens; its scale does not matter.

    Returns:
        Scores, to be compared within one output row.

    Example:
        >>> import torch
        >>> wanda_score(torch.tensor([[-2.0, 1.0]]), torch.tensor([1.0, 3.0]))
        tensor([[2., 3.]])

    Reference:
        Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", equation 1.
    """
    return weight.abs() * input_norm
