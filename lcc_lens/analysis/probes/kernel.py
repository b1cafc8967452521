"""Kernel probes on contrastive pairs: how much the interaction of two activations predicts."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def interaction_kernel(
    context: Float[Tensor, "head pair d_head"], difference: Float[Tensor, "head pair d_head"]
) -> Float[Tensor, "head pair pair"]:
    r"""The kernel of a model whose weights on the difference depend linearly on the context.

    $f(a, d) = (w + B a) \cdot d$ with a Gaussian prior on $w$ and $B$ has the kernel

    $$k((a, d), (a', d')) = (1 + a \cdot a' / d_{head}) \, d \cdot d' / d_{head}$$

    where every coordinate of $a$ has mean 0 and variance 1 and every coordinate of $d$ mean square 1 over the pairs.
    It is odd in $d$: exchanging the answers of a pair changes the sign of $f$. Adding a constant to the context, or
    scaling a coordinate, does not change the kernel.
    """
    a, d = _scaled(context - context.mean(1, keepdim=True)), _scaled(difference)
    return (1 + a @ a.mT) * (d @ d.mT)


def leave_one_out(
    kernel: Float[Tensor, "head pair pair"], ridges: tuple[float, ...]
) -> Float[Tensor, "ridge head pair"]:
    r"""Kernel ridge regression on the target 1, predicted for every pair by the fit on all other pairs.

    With $G = (K + \lambda I)^{-1}$ and $\alpha = G 1$ the prediction for a pair left out is exactly
    $f_{-i}(i) = 1 - \alpha_i / G_{ii}$. Under a kernel that is odd in the difference, a pair and the same pair
    exchanged (target -1) are one observation, so both are left out together.

    Args:
        ridges: values of $\lambda$, above 0.
    """
    identity = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    results = []
    for ridge in ridges:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel + ridge * identity))
        results.append(1 - inverse.sum(-1) / inverse.diagonal(dim1=-2, dim2=-1))
    return torch.stack(results)


def squared_loss(prediction: Float[Tensor, "*axis"]) -> Float[Tensor, "*axis"]:
    """The squared error to the target 1, at most 4: the loss of the opposite answer."""
    return (1 - prediction).square().clamp_max(4.0)


def _scaled(z: Float[Tensor, "head pair d_head"]) -> Float[Tensor, "head pair d_head"]:
    r"""Mean square $1 / d_{head}$ per coordinate; coordinates with only rounding errors become 0."""
    size = z.square().mean(1, keepdim=True).sqrt()
    floor = 16 * torch.finfo(z.dtype).eps * size.amax(-1, keepdim=True)
    scaled = z / size.clamp_min(torch.finfo(z.dtype).tiny) / z.shape[-1] ** 0.5
    return torch.where(size > floor, scaled, torch.zeros_like(z))
