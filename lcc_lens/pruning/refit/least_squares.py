"""Least squares under a mask: the best surviving weights of a linear map, row by row, pure tensor mathematics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lcc_lens.core.errors import LensError

#: A map with at most so many inputs is solved exactly, row by row.
_NARROW = 128
#: Rows that are solved at once there.
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class NormalEquations:
    r"""What decides the best weights $w$ of a row: $A_{SS} w_S = b_S$ on the surviving columns $S$, zero elsewhere.

    For inputs $X$ and wanted outputs $Y$ of all rows, with a pull of strength $\lambda$ towards weights $T$,
    $A = X^T X + \lambda I$ and $B = Y^T X + \lambda T$.
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
        r"""For outputs that a dense map $T$ gives on the same inputs, or on its own.

        Args:
            second_moment: $X^T X$ of the inputs that the map will see.
            target: $T$, the dense weights.
            cross_moment: $X_{dense}^T X$ where the wanted outputs are the dense map's on other inputs; the same inputs
                if not given.
            product: $Y^T X$ itself, where other outputs are wanted than those of the dense map.
            ridge: the pull towards the dense weights, as a share of the mean of the diagonal of $X^T X$.

        Raises:
            LensError: a moment is not finite.
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
    r"""Solve $A_{SS} w_S = b_S$ for every row's own columns $S$; weights outside the mask stay exactly zero.

    Narrow maps are solved exactly, by one Cholesky factor per row. Wider ones by conjugate gradients, all rows at once
    (one matrix product a step), preconditioned by the diagonal; never worse than the start.

    Args:
        equations: the rows' normal equations.
        keep: the weights that survive.
        start: weights to begin with, such as the pruned ones; what lies outside the mask counts as zero.
        tolerance: of conjugate gradients, the norm of the residual relative to the right side's, over all rows.
        max_iterations: steps at most.

    Returns:
        Weights with zeros wherever ``keep`` is false.

    Reference:
        SparseGPT's compensation (Frantar & Alistarh 2023, section 3) with the mask given.
    """
    if keep.shape[1] <= _NARROW:
        return torch.cat([
            _exact(equations.A, rhs, kept)
            for rhs, kept in zip(equations.B.split(_ROWS_AT_ONCE), keep.split(_ROWS_AT_ONCE), strict=True)
        ])  # fmt: skip
    found = _conjugate_gradients(equations, keep, torch.where(keep, start, 0), tolerance, max_iterations)
    is_better = equations.error(found) <= equations.error(torch.where(keep, start, 0))  # not if it is NaN
    return torch.where(is_better[:, None], found, torch.where(keep, start, 0))


def _exact(
    A: Float[Tensor, "in in"], rhs: Float[Tensor, "row in"], keep: Bool[Tensor, "row in"]
) -> Float[Tensor, "row in"]:
    precise = A.double()
    masked = torch.where(keep[:, :, None] & keep[:, None, :], precise, 0)
    masked.diagonal(dim1=1, dim2=2).add_((~keep).double())  # outside the mask the system reads w = 0
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
        step = torch.where(curvature > 0, product / curvature, 0)  # rows that are through stay where they are
        weight = weight + step[:, None] * direction
        residual = residual - step[:, None] * moved
        scaled = residual * inverse_diagonal
        last, product = product, (residual * scaled).sum(1)
        direction = scaled + torch.where(last > 0, product / last, 0)[:, None] * direction
    return weight
