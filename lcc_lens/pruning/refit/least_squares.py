"""Least squares under a mask: the best surviving weights of a linear layer, row by row; pure tensor mathematics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lcc_lens.core.errors import LensError

#: Linear layers with at most this many inputs are solved exactly.
_NARROW = 128
#: Rows that one exact solve takes together.
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class NormalEquations:
    r"""Normal equations $A_{SS} w_S = b_S$ of every row's weights $w$ on its surviving columns $S$.

    For inputs $X$, target outputs $Y$ and a pull of strength $\lambda$ towards the dense weights $T$,
    $A = X^T X + \lambda I$ and $B = Y^T X + \lambda T$; $b$ is a row of $B$.
    """

    A: Float[Tensor, "in in"]
    B: Float[Tensor, "out in"]

    @classmethod
    def of(
        cls,
        second_moment: Float[Tensor, "in in"],
        target: Float[Tensor, "out in"],
        *,
        cross_moment: Float[Tensor, "in in"] | None = None,
        product: Float[Tensor, "out in"] | None = None,
        ridge: float = 0.01,
    ) -> NormalEquations:
        r"""Make the equations from second moments.

        Args:
            second_moment: $X^T X$ of the inputs in the pruned model.
            target: $T$, the dense weights.
            cross_moment: $X_{dense}^T X$, to fit the dense outputs $Y = X_{dense} T^T$ on other inputs; $X$ if None.
            product: $Y^T X$ itself, for targets other than dense outputs.
            ridge: $\lambda$ as a fraction of the mean diagonal of $X^T X$.
        """
        moments = [second_moment, *(moment for moment in (cross_moment, product) if moment is not None)]
        if not all(bool(torch.isfinite(moment).all()) for moment in moments):
            raise LensError("expected finite moments of the inputs, got NaN or infinity; compute in float32")
        mean = float(second_moment.diagonal().mean()) or 1.0  # where every input is zero, any positive diagonal serves
        pull = ridge * mean
        A = second_moment.clone()
        A.diagonal().add_(pull)
        if product is None:
            product = target @ (second_moment if cross_moment is None else cross_moment).to(target)
        return cls(A, product + pull * target)

    def error(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
        r"""Each row's $w A w^T - 2 b w^T$: the squared error without its constant part."""
        return ((weight @ self.A - 2 * self.B) * weight).sum(1)


def masked_least_squares(
    equations: NormalEquations,
    keep: Bool[Tensor, "out in"],
    start: Float[Tensor, "out in"],
    *,
    tolerance: float = 1e-3,
    max_iterations: int = 100,
) -> Float[Tensor, "out in"]:
    r"""Solve $A_{SS} w_S = b_S$ for every row's surviving columns $S$; weights outside the mask stay exactly zero.

    Matrices with few columns are solved exactly. Wider ones use conjugate gradients on all rows at once (one matrix
    product a step), preconditioned by the diagonal; a row whose error would grow keeps its start.

    Args:
        start: initial weights, such as the pruned ones; those outside the mask count as zero.
        tolerance: conjugate gradients end at this norm of the residual relative to the right-hand side's.

    Returns:
        Weights with zeros wherever ``keep`` is false.

    Reference:
        SparseGPT's compensation (Frantar & Alistarh 2023, section 3) with a fixed mask.
    """
    if keep.shape[1] <= _NARROW:
        return torch.cat([
            _exact(equations.A, rhs, kept)
            for rhs, kept in zip(equations.B.split(_ROWS_AT_ONCE), keep.split(_ROWS_AT_ONCE), strict=True)
        ])  # fmt: skip
    start = torch.where(keep, start, 0)
    solved = _conjugate_gradients(equations, keep, start, tolerance, max_iterations)
    is_better = equations.error(solved) <= equations.error(start)  # False where an error is NaN
    return torch.where(is_better[:, None], solved, start)


def _exact(
    A: Float[Tensor, "in in"], rhs: Float[Tensor, "row in"], keep: Bool[Tensor, "row in"]
) -> Float[Tensor, "row in"]:
    precise = A.double()
    masked = torch.where(keep[:, :, None] & keep[:, None, :], precise, 0)
    masked.diagonal(dim1=1, dim2=2).add_((~keep).double())  # outside the mask the equation is w = 0
    solved = torch.linalg.solve(masked, torch.where(keep, rhs.double(), 0))
    return torch.where(keep, solved, 0).to(rhs)


def _conjugate_gradients(
    equations: NormalEquations,
    keep: Bool[Tensor, "out in"],
    weight: Float[Tensor, "out in"],
    tolerance: float,
    max_iterations: int,
) -> Float[Tensor, "out in"]:
    A, kept = equations.A, keep.to(weight)
    inverse_diagonal = A.diagonal().reciprocal()
    residual = kept * (equations.B - weight @ A)
    enough = tolerance * float((kept * equations.B).norm())
    scaled = residual * inverse_diagonal
    direction, product = scaled.clone(), (residual * scaled).sum(1)
    for _ in range(max_iterations):
        if float(residual.norm()) <= enough:
            break
        moved = kept * (direction @ A)
        curvature = (direction * moved).sum(1)
        step = torch.where(curvature > 0, product / curvature, 0)  # converged rows stay where they are
        weight = weight + step[:, None] * direction
        residual = residual - step[:, None] * moved
        scaled = residual * inverse_diagonal
        last, product = product, (residual * scaled).sum(1)
        direction = scaled + torch.where(last > 0, product / last, 0)[:, None] * direction
    return weight
