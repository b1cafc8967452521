"""Masks of the weights that stay, with exactly the number of zeros that a sparsity pattern asks for."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lcc_lens.models.architecture.sparsity_patterns import NofM, Pattern, require_fit

Scope = Literal["row", "matrix"]

# Up to this many competing scores, sorting costs no more than a threshold.
_SHORT_ROW = 64


def keep_mask(score: Float[Tensor, "out in"], pattern: Pattern, scope: Scope = "row") -> Bool[Tensor, "out in"]:
    r"""Mark the weights that stay: those with the highest scores, exactly as many as the pattern says.

    With sparsity $s$, the $\lfloor s \, d_{in} \rfloor$ lowest scores of every row are removed, or with scope
    ``matrix`` the $\lfloor s \, d_{out} d_{in} \rfloor$ lowest of the whole matrix. With a pattern N:M, the $M - N$
    lowest of every group are removed, whatever the scope. Of equal scores the leftmost is removed first, so the count
    is always exact and the result reproducible.

    Args:
        pattern: how many weights to remove and where.
        scope: whether unstructured scores are compared within a row or the whole matrix.

    Returns:
        True where a weight stays.

    Raises:
        RequestError: M of an N:M pattern does not divide the number of inputs.

    Example:
        >>> import torch
        >>> keep_mask(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), NofM(2, 4))
        tensor([[ True, False, False,  True]])
    """
    if isinstance(pattern, NofM):
        require_fit(pattern, score.shape[1], "the matrix")
        competing = score.reshape(-1, pattern.m)
        n_zeros = pattern.m - pattern.n
    else:
        competing = score.reshape(1, -1) if scope == "matrix" else score
        n_zeros = int(competing.shape[1] * pattern.sparsity)
    return ~lowest(competing, n_zeros).reshape(score.shape)


def lowest(score: Float[Tensor, "row competing"], n: int) -> Bool[Tensor, "row competing"]:
    """Mark the ``n`` lowest scores of every row; of equal ones the leftmost."""
    if n == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if score.shape[1] > _SHORT_ROW:
        marked = score <= score.kthvalue(n, dim=1, keepdim=True).values
        if bool((marked.sum(dim=1) == n).all()):
            return marked
    # On ties a threshold gives a wrong count. A stable sort does not, but takes several times as long.
    order = torch.argsort(score, dim=1, stable=True)[:, :n]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)
