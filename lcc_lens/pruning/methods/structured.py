"""Structured pruning of one output projection: choose heads or columns and refit the rest; pure tensor mathematics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lcc_lens.core.errors import RequestError
from lcc_lens.pruning.methods.obs import Damped

Schedule = Literal["log", "linear", "uniform", "falling"]
SCHEDULES: tuple[Schedule, ...] = ("log", "linear", "uniform", "falling")

#: How far a schedule's smallest ratio lies below the mean, as a fraction of the mean.
SPREAD = 0.5
#: Largest fraction that a layer may lose.
_MOST_PER_LAYER = 0.95
#: Columns removed at once, as a fraction of those still to remove: many at first, one by one at the end.
_GROUP_FRACTION = 1 / 16


def layer_ratios(schedule: Schedule, ratio: float, n_layers: int, spread: float = SPREAD) -> list[float]:
    r"""The fraction of its weights that every layer loses, with mean ``ratio``.

    Errors of early layers pass through all later ones, so in SlimGPT the ratio rises with depth: layer $l$ of $L$ loses
    $r_0 + c \log(l + 1) / \log L$. The paper leaves $r_0$ open; here $r_0 = (1 - spread) \cdot ratio$, with less spread
    where a layer would lose more than 95 % otherwise.

    Args:
        schedule: ``log`` rises logarithmically, ``linear`` evenly, ``uniform`` not at all; ``falling`` is ``log`` from
            last to first.
        spread: how far the smallest fraction lies below the mean, as a fraction of the mean.

    Example:
        >>> [round(r, 3) for r in layer_ratios("linear", 0.2, 3)]
        [0.1, 0.2, 0.3]

    Reference:
        Ling et al. 2024, "SlimGPT: Layer-wise Structured Pruning for Large Language Models", section 3.4.
    """
    if schedule not in SCHEDULES:
        raise RequestError(f"expected a schedule out of {', '.join(SCHEDULES)}, got {schedule!r}; choose one of these")
    if ratio > _MOST_PER_LAYER:
        raise RequestError(f"expected a sparsity of at most {_MOST_PER_LAYER} for whole heads, got {ratio}; lower it")
    if schedule == "uniform" or n_layers == 1:
        return [ratio] * n_layers
    if schedule == "linear":
        rise = [layer / (n_layers - 1) for layer in range(n_layers)]
    else:
        rise = [math.log(layer + 1) / math.log(n_layers) for layer in range(n_layers)]
    mean = sum(rise) / n_layers
    steepness = 1 / mean - 1  # how far the largest ratio lies above the mean, for a spread of 1
    spread = min(spread, (_MOST_PER_LAYER / ratio - 1) / steepness) if ratio > 0 else spread
    ratios = [ratio * (1 - spread + spread * height / mean) for height in rise]
    return ratios[::-1] if schedule == "falling" else ratios


@dataclass(frozen=True)
class Removal:
    """Groups or columns in order of removal, and the output error after each step."""

    steps: tuple[Tensor, ...]
    """Positions of the groups or columns of each step ``[removed]``."""
    errors: tuple[float, ...]
    """Squared change of the outputs after each step and its compensation."""

    @property
    def order(self) -> Int[Tensor, " removed"]:
        """All positions, in order of removal."""
        return torch.cat(self.steps) if self.steps else torch.empty(0, dtype=torch.long)

    def error_at(self, n: int) -> float:
        """The error after ``n`` removals, interpolated between steps."""
        done, error = 0, 0.0
        for step, after in zip(self.steps, self.errors, strict=True):
            if done + len(step) >= n:
                return error + (after - error) * (n - done) / len(step)
            done, error = done + len(step), after
        return error


def group_errors(
    weight: Float[Tensor, "out in"], inverse: Float[Tensor, "in in"], groups: Int[Tensor, "group column"]
) -> Float[Tensor, " group"]:
    r"""The output error of removing each group of columns, after the other columns compensate optimally.

    For the columns $g$ it is $tr(W_g [H^{-1}]_{gg}^{-1} W_g^T)$. With the columns in head-first order the Cholesky
    factor of $H^{-1}$ begins with that of $[H^{-1}]_{gg}$, so one batched Cholesky of the blocks serves all groups. The
    sum over columns of $(w_j / U_{jj})^2$, with $w_j$ after the columns before it are removed, is a triangular solve.

    Args:
        inverse: $H^{-1}$.

    Reference:
        Ling et al. 2024 (SlimGPT), section 3.2, batched greedy pruning.
    """
    blocks = inverse[groups[:, :, None], groups[:, None, :]]
    columns = weight[:, groups].permute(1, 2, 0)
    factor = torch.linalg.cholesky(blocks)
    errors: Tensor = torch.linalg.solve_triangular(factor, columns, upper=False).square().sum(dim=(1, 2))
    return errors


def cheapest_groups(
    weight: Float[Tensor, "out in"], inputs: Damped, groups: Int[Tensor, "group column"], n_remove: int
) -> Removal:
    """Choose groups of columns one at a time by the smallest error, compensating after each.

    Args:
        weight: weight of the output projection, one row per output.
        groups: the columns of every group, such as those of a head; groups do not overlap.

    Returns:
        Positions in ``groups``, one per step.
    """
    precise, inverse = weight.to(inputs.moment.dtype).clone(), inputs.inverse()
    left, removed, after = list(range(len(groups))), list[Tensor](), list[float]()
    while len(removed) < n_remove:
        errors = group_errors(precise, inverse, groups[left])
        cheapest = int(errors.argmin())
        after.append(float(errors[cheapest]) + (after[-1] if after else 0.0))
        removed.append(torch.tensor([left.pop(cheapest)], device=weight.device))
        if len(removed) < n_remove:
            _eliminate(precise, inverse, groups[removed[-1][0]])
    return Removal(tuple(removed), tuple(after))


def cheapest_columns(
    weight: Float[Tensor, "out in"], inputs: Damped, n_remove: int, group_fraction: float = _GROUP_FRACTION
) -> Removal:
    """Choose columns by the smallest error in shrinking steps: many at first, one by one at the end.

    Args:
        weight: weight of the output projection, one row per output.
        group_fraction: size of a step as a fraction of the columns still to remove; 0 removes one column at a time.

    Returns:
        The columns of each step.

    Reference:
        Ling et al. 2024 (SlimGPT), section 3.3, dynamic group size.
    """
    precise, inverse = weight.to(inputs.moment.dtype).clone(), inputs.inverse()
    is_gone = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    removed, after = list[Tensor](), list[float]()
    while (n_left := n_remove - sum(len(group) for group in removed)) > 0:
        errors = (precise.square().sum(dim=0) / inverse.diagonal()).masked_fill(is_gone, math.inf)
        size = max(1, int(n_left * group_fraction))
        group = torch.argsort(errors, stable=True)[:size]
        together = float(group_errors(precise, inverse, group[None]))
        after.append(together + (after[-1] if after else 0.0))
        removed.append(group)
        is_gone[group] = True
        if n_left > size:
            _eliminate(precise, inverse, group)
    return Removal(tuple(removed), tuple(after))


def refitted(
    weight: Float[Tensor, "out in"], inputs: Damped, removed: Int[Tensor, " removed"]
) -> Float[Tensor, "out in"]:
    r"""Remove columns and refit the others by least squares.

    The kept columns $k$ become $W H_{:,k} H_{kk}^{-1}$, which minimises $\lVert (W - W') X \rVert^2$ (the
    damping adds a small pull towards $W$); the removed ones become exactly zero.

    Args:
        weight: weight of the output projection, one row per output.

    Returns:
        The new weight, in the format of ``inputs``.
    """
    kept = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    kept[removed] = False
    moment = inputs.moment
    fitted = torch.zeros_like(weight, dtype=moment.dtype)
    target = moment[kept] @ weight.to(moment.dtype).T
    fitted[:, kept] = torch.cholesky_solve(target, torch.linalg.cholesky(moment[kept][:, kept])).T
    return fitted


def _eliminate(
    weight: Float[Tensor, "out in"], inverse: Float[Tensor, "in in"], columns: Int[Tensor, " column"]
) -> None:
    """Remove columns from a weight and the inverse second moment, in place; the other columns compensate."""
    step = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
    weight -= weight[:, columns] @ step
    inverse -= inverse[:, columns] @ step
    weight[:, columns] = 0
    # Removed rows and columns are zero but for rounding; a unit diagonal keeps later divisions finite.
    inverse[columns] = 0
    inverse[:, columns] = 0
    inverse[columns, columns] = 1
