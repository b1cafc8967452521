"""Linear probes for all heads at once, trained as in the paper (200 steps of Adam)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class LinearProbe(NamedTuple):
    """One logistic probe per head."""

    weight: Float[Tensor, "head feature"]
    bias: Float[Tensor, " head"]


def fit_linear_probes(
    features: Float[Tensor, "head example feature"],
    labels: Bool[Tensor, " example"],
    *,
    epochs: int = 200,
    lr: float = 1e-2,
    seed: int | torch.Generator = 0,
) -> LinearProbe:
    r"""Fit $\sigma(w_h \cdot x + b_h)$ to the labels for every head at once.

    Full-batch Adam on the binary cross-entropy, as published (200 epochs, learning rate 1e-2, the default initial
    values of a linear layer). The heads do not interact, so one batched product replaces the loop over heads. The
    result depends on the initial values and on the number of steps;
    :func:`lcc_lens.analysis.probes.converged.fit_pair_probes` finds the minimum.

    Args:
        seed: of the initial values, or the generator that they are drawn from.
    """
    n_heads, n_examples, n_features = features.shape
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(n_features)
    start = (torch.rand(n_heads, n_features + 1, generator=generator) * 2 - 1) * bound
    theta, target = start.to(features), labels.to(features)
    design = torch.cat([features, features.new_ones(n_heads, n_examples, 1)], dim=-1)
    first, second = torch.zeros_like(theta), torch.zeros_like(theta)
    beta_1, beta_2, eps = 0.9, 0.999, 1e-8
    for step in range(1, epochs + 1):
        residual = torch.sigmoid(torch.bmm(design, theta[..., None])[..., 0]) - target
        gradient = torch.bmm(residual[:, None, :], design)[:, 0] / n_examples
        first.lerp_(gradient, 1 - beta_1)
        second.lerp_(gradient.square(), 1 - beta_2)
        step_size = lr / (1 - beta_1**step)
        theta = theta - step_size * first / ((second / (1 - beta_2**step)).sqrt() + eps)
    return LinearProbe(theta[:, :-1], theta[:, -1])


def split_pairs(n_pairs: int, held_out_share: float, seed: int) -> tuple[Int[Tensor, " train"], Int[Tensor, " test"]]:
    """Split pairs at random into training and test pairs, at least one each."""
    order = torch.randperm(n_pairs, generator=torch.Generator().manual_seed(seed))
    n_test = min(max(1, math.ceil(n_pairs * held_out_share)), n_pairs - 1)
    return order[n_test:], order[:n_test]
