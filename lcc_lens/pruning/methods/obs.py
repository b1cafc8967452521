"""Second-order pruning of one matrix (Optimal Brain Surgeon): SparseGPT's blocked sweep, pure tensor mathematics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lcc_lens.core.errors import LensError
from lcc_lens.models.architecture.sparsity_patterns import NofM, Pattern, require_fit
from lcc_lens.pruning.methods.masks import lowest

#: Fraction of the mean diagonal that is added to a second moment before it is inverted.
DAMPING = 0.01
#: Columns that are pruned before everything to their right is updated.
BLOCK_SIZE = 128
_MOST_DAMPING = 1e4


@dataclass(frozen=True)
class Damped:
    """A second moment of inputs that can be inverted, in float64 (float32 on MPS)."""

    moment: Float[Tensor, "in in"]
    """The second moment with ``damping`` times its mean diagonal added."""
    factor: Float[Tensor, "in in"]
    """Its lower Cholesky factor."""
    damping: float
    """The damping that was needed, as a fraction of the mean diagonal."""
    dead: Bool[Tensor, " in"]
    """Features that are zero in every input."""

    def inverse(self) -> Float[Tensor, "in in"]:
        """The inverse of the damped second moment."""
        return torch.cholesky_inverse(self.factor)


def damped(second_moment: Float[Tensor, "in in"], damping: float = DAMPING) -> Damped:
    r"""Add just enough to the diagonal of $H = X^T X$ for a Cholesky factor to exist.

    Args:
        second_moment: symmetric and finite; its scale does not matter.
        damping: fraction of the mean diagonal to begin with; ten times as much after every failure.
    """
    precise = second_moment.to(torch.float32 if second_moment.device.type == "mps" else torch.float64)
    if not bool(torch.isfinite(precise).all()):
        raise LensError("expected a finite second moment of the inputs, got NaN or infinity; compute in float32")
    diagonal = precise.diagonal()
    dead = diagonal == 0
    mean = float(diagonal.mean()) or 1.0  # where every input is zero, any positive diagonal serves
    while damping <= _MOST_DAMPING:
        moment = precise + damping * mean * torch.eye(len(precise), dtype=precise.dtype, device=precise.device)
        factor, failed = torch.linalg.cholesky_ex(moment)
        if not bool(failed):
            return Damped(moment, factor, damping, dead)
        damping *= 10
    raise LensError("expected a positive second moment of the inputs, got one that no damping corrects; check the data")


def output_error(change: Float[Tensor, "out in"], second_moment: Float[Tensor, "in in"]) -> float:
    r"""The squared change of a linear map's outputs, $\lVert \Delta W X \rVert^2 = tr(\Delta W H \Delta W^T)$.

    Args:
        change: the new weight minus the old one.
        second_moment: $H = X^T X$ of the inputs, summed over tokens.
    """
    return float(((change @ second_moment.to(change)) * change).sum(dtype=torch.float32))


def sparsegpt(
    weight: Float[Tensor, "out in"], inputs: Damped, pattern: Pattern, block_size: int = BLOCK_SIZE
) -> Float[Tensor, "out in"]:
    r"""Prune a matrix from left to right; the weights right of a removed one compensate for it.

    With $H^{-1} = U^T U$ ($U$ upper triangular), removing $w_j$ costs $(w_j / U_{jj})^2$ and changes the columns right
    of it by $-(w_j / U_{jj}) \, U_{j,:}$. Unstructured, the cheapest weights of every block of columns are removed,
    over all rows together, so that $\lfloor s \, d_{out} \, j \rfloor$ of the first $j$ columns' weights are zero
    after each block. With N:M, the cheapest of every group are removed. Columns within a block are updated one by one,
    those right of it all at once.

    Args:
        weight: one row per output, float32 or wider.
        pattern: how many weights to remove and where.
        block_size: columns per block (rounded down to whole groups of an N:M pattern).

    Raises:
        RequestError: M of an N:M pattern does not divide the number of inputs.

    Reference:
        Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", section 3.
    """
    require_fit(pattern, weight.shape[1], "the matrix")
    U = torch.linalg.cholesky(inputs.inverse(), upper=True).to(weight.dtype)
    # The transpose makes columns contiguous, which are read and written one by one.
    columns = weight.T.contiguous().clone()
    columns[inputs.dead] = 0
    width = max(block_size - block_size % pattern.m, pattern.m) if isinstance(pattern, NofM) else block_size
    for start in range(0, len(columns), width):
        stop = min(start + width, len(columns))
        n_zeros = _zeros_until(stop, columns, pattern) - _zeros_until(start, columns, pattern)
        errors = _prune_block(columns[start:stop], U[start:stop, start:stop], pattern, n_zeros)
        columns[stop:] -= U[start:stop, stop:].T @ errors
    return columns.T.contiguous()


def _zeros_until(stop: int, columns: Float[Tensor, "in out"], pattern: Pattern) -> int:
    return int(pattern.sparsity * columns.shape[1] * stop + 1e-9)


def _prune_block(
    block: Float[Tensor, "column out"], U: Float[Tensor, "column column"], pattern: Pattern, n_zeros: int
) -> Float[Tensor, "column out"]:
    """Prune a block of columns in place; gives the scaled errors for which the columns right of it compensate."""
    diagonal = U.diagonal()
    removed = torch.zeros_like(block, dtype=torch.bool)
    if not isinstance(pattern, NofM):
        removed = lowest((block / diagonal[:, None]).square().T.reshape(1, -1), n_zeros).reshape(block.T.shape).T
    errors = torch.zeros_like(block)
    for j in range(len(block)):
        if isinstance(pattern, NofM) and j % pattern.m == 0:
            group = slice(j, j + pattern.m)
            cost = (block[group] / diagonal[group, None]).square()
            removed[group] = lowest(cost.T, pattern.m - pattern.n).T
        errors[j] = torch.where(removed[j], block[j], 0) / diagonal[j]
        block[j + 1 :].addr_(U[j, j + 1 :], errors[j], alpha=-1)
        block[j].masked_fill_(removed[j], 0)
    return errors
