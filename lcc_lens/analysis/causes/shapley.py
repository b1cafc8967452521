"""Shapley values of three causes, exactly, from a function of every combination of them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

Combination = tuple[bool, bool, bool]
#: All combinations of three causes, each pruned (False) or dense (True).
COMBINATIONS: tuple[Combination, ...] = tuple((a, b, c) for a, b, c in product((False, True), repeat=3))


def shapley_parts(outputs: Mapping[Combination, Tensor]) -> Float[Tensor, "cause ..."]:
    r"""Divide $f(1,1,1) - f(0,0,0)$ among three causes: the mean over all orders of what adding a cause changes.

    $\phi_c = \sum_{S \not\ni c} w_{|S|} (f(S \cup c) - f(S))$ with $w = 1/3, 1/6, 1/3$. The parts sum to the
    difference, a cause that changes nothing gets zero, and the order of causes plays no role.

    Args:
        outputs: by combination, the function's value, all of one shape; True stands for dense.

    Reference:
        Shapley 1953, A value for n-person games.
    """
    weight = (1 / 3, 1 / 6, 1 / 3)
    parts = []
    for cause in range(3):
        others = [combination for combination in COMBINATIONS if not combination[cause]]
        changes = [weight[sum(without)] * (outputs[_with(without, cause)] - outputs[without]) for without in others]
        parts.append(torch.stack(changes).sum(0))
    return torch.stack(parts)


def _with(combination: Combination, cause: int) -> Combination:
    first, second, third = (present or place == cause for place, present in enumerate(combination))
    return first, second, third
