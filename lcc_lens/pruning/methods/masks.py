"""Which weights stay: sparsity patterns, masks that keep exactly their share, and the pattern of a given matrix."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lcc_lens.models.architecture.sparsity_patterns import NofM, Pattern, require_fit

Scope = Literal["row", "matrix"]

# Up to this many competing scores a full order costs no more than a threshold.
_SHORT_ROW = 64


def keep_mask(score: Float[Tensor, "out in"], pattern: Pattern, scope: Scope = "row") -> Bool[Tensor, "out in"]:
    r"""Mark the weights that stay: the highest scores, exactly as many as the pattern says.

    Unstructured with sparsity $s$, the $\lfloor s \, d_{in} \rfloor$ lowest of every row go, or with scope ``matrix``
    the $\lfloor s \, d_{out} d_{in} \rfloor$ lowest of the whole. N:M, the $M - N$ lowest of every group go, whatever
    the scope. Of equal scores the one further left goes first: the count is exact, and the same on every run, also
    where scores are tied or zero.

    Args:
        score: finite scores, one row per output.
        pattern: how much goes and where.
        scope: within what unstructured scores compete.

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
    """Mark the ``n`` lowest scores of every row; of equal ones those further left."""
    if n == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if score.shape[1] > _SHORT_ROW:
        marked = score <= score.kthvalue(n, dim=1, keepdim=True).values
        if bool((marked.sum(dim=1) == n).all()):
            return marked
    # A threshold misses the count on ties; a stable order never does, but takes several times as long.
    order = torch.argsort(score, dim=1, stable=True)[:, :n]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)
