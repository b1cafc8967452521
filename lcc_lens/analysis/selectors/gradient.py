"""Gradient selector: how fast the response loss falls when a head's constant changes."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.analysis.components import LostComponents
from lcc_lens.analysis.head_scores import HeadScores
from lcc_lens.analysis.selectors.backward import ResponseGradients


def score_gradient(gradients: ResponseGradients, components: LostComponents) -> HeadScores:
    r"""The gain of a training step on one head, $u \, |E g|$, in nats per token and unit of the injection.

    $g$ is the gradient of an example's mean response log-likelihood to a constant added to the head's output, and
    $u$ the head's root mean square difference, the unit in which
    :class:`~lcc_lens.injection.LccInjection` holds its numbers: to first order, a step of length 1 gains this much.

    The norm of a mean over few examples is positive even where $E g = 0$, since the noise has a length too. So its
    square is estimated without bias from products of different examples,
    $\widehat{|E g|^2} = \frac{1}{N(N-1)} \sum_{n \ne m} g_n \cdot g_m$, and its root taken with the sign kept: a head
    whose gradient is all noise scores around zero, on either side. The standard error is a jackknife over groups of
    examples; the gradient knows nothing of the dense model except through $u$.

    Args:
        gradients: from :func:`~lcc_lens.analysis.selectors.backward.response_gradients`.
    """
    total, square, n = gradients.group_gradient.sum(0), gradients.group_square.sum(0), gradients.n_examples
    unit = components.root_mean_square().double()
    value = _signed_norm(total.double(), square.double(), n) * unit
    without = [
        _signed_norm((total - gradients.group_gradient[k]).double(), (square - gradients.group_square[k]).double(),
                     n - int(gradients.group_size[k])) * unit
        for k in range(len(gradients.group_size))
    ]  # fmt: skip
    return HeadScores("gradient", value.float(), _jackknife(without).float(), n, {"groups": len(without)})


def _signed_norm(
    total: Float[Tensor, "layer head d_head"], square: Float[Tensor, "layer head"], n: int
) -> Float[Tensor, "layer head"]:
    """Root of the unbiased squared norm of the mean, with its sign; NaN for a single example."""
    if n < 2:
        return square * math.nan
    unbiased = (total.square().sum(-1) - square) / (n * (n - 1))
    return unbiased.sign() * unbiased.abs().sqrt()


def _jackknife(without: list[Float[Tensor, "layer head"]]) -> Float[Tensor, "layer head"]:
    """The standard error of a statistic from its values with one group left out at a time (jackknife)."""
    values = torch.stack(without)
    return ((len(values) - 1) * values.var(0, correction=0)).sqrt()
