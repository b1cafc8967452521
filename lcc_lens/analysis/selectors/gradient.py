"""Gradient selector: how much the response loss decreases with a change of a head's constant, to first order."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.analysis.components import LostComponents
from lcc_lens.analysis.head_scores import HeadScores
from lcc_lens.analysis.selectors.backward import ResponseGradients


def score_gradient(gradients: ResponseGradients, components: LostComponents) -> HeadScores:
    r"""The first-order gain of a training step on one head, $u \, |E g|$, in nats per token and unit of the injection.

    $g$ is the gradient of an example's mean response log-likelihood with respect to a constant added to the head's
    output, and $u$ the head's root mean square difference, the unit of the parameters of
    :class:`~lcc_lens.restoration.injections.constants.LccInjection`.

    The norm of a mean over few examples is positive even if $E g = 0$, because of noise. So its square is estimated
    without bias from products of different examples,
    $\widehat{|E g|^2} = \frac{1}{N(N-1)} \sum_{n \ne m} g_n \cdot g_m$, and the root keeps the sign: a head whose
    gradient is only noise scores near zero, with either sign. The standard error is a jackknife over groups of
    examples. The score depends on the dense model through $u$ alone.

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
    jackknife = ((len(without) - 1) * torch.stack(without).var(0, correction=0)).sqrt()
    return HeadScores("gradient", value.float(), jackknife.float(), n, {"groups": len(without)})


def _signed_norm(
    total: Float[Tensor, "layer head d_head"], square: Float[Tensor, "layer head"], n: int
) -> Float[Tensor, "layer head"]:
    """Signed root of the unbiased estimate of the mean's squared norm; NaN for a single example."""
    if n < 2:
        return square * math.nan
    unbiased = (total.square().sum(-1) - square) / (n * (n - 1))
    return unbiased.sign() * unbiased.abs().sqrt()
