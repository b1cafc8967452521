"""Trainable changes of one weight that keep its zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

ChangeKind = Literal["low-rank", "gain", "shift"]


class Change(nn.Module):
    """A trainable function of a weight ``[out, in]`` (or a norm's ``[d]``), with parameters in float32.

    Zeros of a matrix stay exactly zero.
    """

    kind: ChangeKind

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight."""
        raise NotImplementedError

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape (``[out, in]``, or ``[d]``) can be changed so."""
        raise NotImplementedError


class LowRank(Change):
    r"""$W + M \odot (B A)$ with the mask $M$ of nonzero weights: masked LoRA, which merges.

    Args:
        A: ``[rank, in]``; B: ``[out, rank]``.

    Reference:
        PERP's masked LoRA (arXiv 2312.15230), LoRA (arXiv 2106.09685).
    """

    kind: ChangeKind = "low-rank"

    def __init__(self, A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"]) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    @classmethod
    def random(cls, shape: tuple[int, ...], rank: int, generator: torch.Generator) -> LowRank:
        """The identity: A drawn uniformly with variance 1 / (3 n_in) as in LoRA, B zero."""
        n_out, n_in = shape
        A = (torch.rand(rank, n_in, generator=generator) * 2 - 1) / n_in**0.5
        return cls(A, torch.zeros(n_out, rank))

    def forward(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        delta = self.B.to(weight) @ self.A.to(weight)  # in the weight's dtype: several times faster in bfloat16
        return torch.addcmul(weight, delta, (weight != 0).to(weight))

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape == (self.B.shape[0], self.A.shape[1])


class Gain(Change):
    """$W (1 + g)$ by column: scales the layer's inputs, with no parameter added at inference.

    Args:
        gain: g of the chosen inputs.
        columns: the chosen inputs; all others keep their weights.

    Reference:
        LoFiT's scaling of head outputs (arXiv 2406.01563).
    """

    kind: ChangeKind = "gain"

    columns: Int[Tensor, " chosen"]

    def __init__(self, gain: Float[Tensor, " chosen"], columns: Int[Tensor, " chosen"]) -> None:
        super().__init__()
        self.gain = nn.Parameter(gain)
        self.register_buffer("columns", columns)

    def forward(self, weight: Tensor) -> Tensor:
        scale = self.gain.new_ones(weight.shape[-1]).index_put((self.columns,), 1 + self.gain)
        return (weight * scale.to(weight.device)).to(weight.dtype)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and int(self.columns.max()) < shape[1]


class Shift(Change):
    """$W + M * D$: every nonzero weight on its own; of a norm, every weight.

    Args:
        shift: D, of the weight's shape.
    """

    kind: ChangeKind = "shift"

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(shift.float())

    def forward(self, weight: Tensor) -> Tensor:
        shift = self.shift.to(weight)
        return weight + shift if weight.ndim == 1 else torch.addcmul(weight, shift, (weight != 0).to(weight))

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape == tuple(self.shift.shape)


_KINDS: dict[str, type[Change]] = {"low-rank": LowRank, "gain": Gain, "shift": Shift}


def merged(sets: Iterable[Mapping[str, Change]]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Join sets of changes by name; changes of the same weight act one after the other."""
    by_name: dict[str, list[Change]] = {}
    for changes in sets:
        for name, change in changes.items():
            by_name.setdefault(name, []).append(change)
    return {name: changes[0] if len(changes) == 1 else nn.Sequential(*changes) for name, changes in by_name.items()}


def read_change(kind: str, parameters: dict[str, Tensor]) -> Change:
    """Read a saved change.

    Raises:
        KeyError: an unknown kind; TypeError: parameters that the kind does not have.
    """
    change = _KINDS[kind](**parameters)
    return change.requires_grad_(False)
