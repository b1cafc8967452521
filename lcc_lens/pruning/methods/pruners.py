"""How one decoder layer is pruned: collect statistics of the inputs that stream by, then give the new weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lcc_lens.core.errors import LensError
from lcc_lens.models.architecture.anatomy import LayerAnatomy
from lcc_lens.models.architecture.sparsity_patterns import Pattern
from lcc_lens.pruning.methods.masks import Scope, keep_mask
from lcc_lens.pruning.methods.scores import magnitude_score, wanda_score

# Tokens whose squares are summed at once.
_TOKENS_AT_ONCE = 256

Choice = Literal["error", "magnitude", "random"]
Split = Literal["error", "spared", "proportional"]


@dataclass(frozen=True)
class LayerTask:
    """What a pruner is asked to do with one decoder layer."""

    pattern: Pattern
    """How much goes and where; a structured method removes the pattern's share of the layer's weights."""
    scope: Scope = "row"
    """Within what unstructured scores compete."""
    anatomy: LayerAnatomy | None = None
    """Heads and neurons of the layer, for structured methods."""
    choice: Choice = "error"
    """How a structured method chooses heads and neurons: by error, or the controls."""
    split: Split = "spared"
    """How it divides the share between heads and neurons."""
    multiple: int = 1
    """A structured method removes neurons in multiples of this."""
    allowed_groups: frozenset[int] | None = None
    """Numbers of key-value groups that may go; any if None."""
    seed: int = 0
    """For methods that draw; another one for every layer."""


@dataclass(frozen=True)
class Removed:
    """What a structured method removed from one layer, as positions in the dense layer."""

    heads: Int[Tensor, " head"] = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    groups: Int[Tensor, " group"] = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    neurons: Int[Tensor, " neuron"] = field(default_factory=lambda: torch.empty(0, dtype=torch.long))


@runtime_checkable
class LayerPruner(Protocol):
    """What the walk over the layers asks of a pruning method; it makes a fresh one for every layer.

    A whole layer, not one matrix, is the unit: a structured method removes matching rows and columns of several
    matrices. Matrices go by the names of their tensors in the checkpoint.
    """

    uses_inputs: ClassVar[bool]
    """Whether the method needs calibration data; without, the model is never run."""

    @classmethod
    def for_layer(cls, task: LayerTask) -> LayerPruner:
        """A fresh pruner for one layer."""
        ...

    def observe(self, name: str, inputs: Float[Tensor, "token in"]) -> None:
        """Take in a batch of inputs of a matrix, in the compute format; called many times before `pruned`."""

    def pruned(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Give the new float32 weight of each matrix to change.

        Args:
            weights: float32 weights ``[out, in]`` of the layer's matrices, read from disk on access.
        """

    def removed(self) -> Removed:
        """What went as a whole, once `pruned` is through."""


class MaskPruner(ABC):
    """Prunes every matrix by itself: the lowest scores become zero, all other weights stay as they are."""

    uses_inputs: ClassVar[bool]

    def __init__(self, pattern: Pattern, scope: Scope) -> None:
        self._pattern = pattern
        self._scope = scope

    @classmethod
    def for_layer(cls, task: LayerTask) -> MaskPruner:
        """A fresh pruner for one layer."""
        return cls(task.pattern, task.scope)

    @abstractmethod
    def observe(self, name: str, inputs: Float[Tensor, "token in"]) -> None:
        """Take in a batch of inputs of a matrix."""

    @abstractmethod
    def score(self, name: str, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """What each weight of a matrix is worth."""

    def keep(self, name: str, weight: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """Which weights of a matrix stay."""
        return keep_mask(self.score(name, weight), self._pattern, self._scope)

    def pruned(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Give every matrix with its lowest-scored weights set to zero."""
        for name, weight in weights.items():
            yield name, torch.where(self.keep(name, weight), weight, 0)

    def removed(self) -> Removed:
        """Nothing goes as a whole."""
        return Removed()


class MagnitudePruner(MaskPruner):
    """Removes the smallest weights, per output row or per matrix; needs no data."""

    uses_inputs: ClassVar[bool] = False

    def observe(self, name: str, inputs: Float[Tensor, "token in"]) -> None:
        """Nothing to learn from inputs."""

    def score(self, name: str, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The weights' sizes."""
        return magnitude_score(weight)


class WandaPruner(MaskPruner):
    """Removes the weights with the smallest product of size and input norm in every output row.

    Reference:
        Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models".
    """

    uses_inputs: ClassVar[bool] = True

    def __init__(self, pattern: Pattern, scope: Scope) -> None:
        super().__init__(pattern, scope)
        self._sum_of_squares: dict[str, Float[Tensor, " in"]] = {}

    def observe(self, name: str, inputs: Float[Tensor, "token in"]) -> None:
        """Add the squares of each input feature, in float32 whatever the model computes in."""
        squares = _sum_of_squares(inputs)
        self._sum_of_squares[name] = self._sum_of_squares[name] + squares if name in self._sum_of_squares else squares

    def score(self, name: str, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The weights' sizes times their inputs' norms.

        Raises:
            LensError: no input of the matrix was seen, or one was not finite.
        """
        if name not in self._sum_of_squares:
            raise LensError(f"expected calibration inputs of {name}, got none; the architecture is not supported")
        norm = self._sum_of_squares[name].sqrt()
        if not bool(torch.isfinite(norm).all()):
            raise LensError(f"expected finite inputs of {name}, got NaN or infinity; compute in float32")
        return wanda_score(weight, norm)


def _sum_of_squares(inputs: Float[Tensor, "token in"]) -> Float[Tensor, " in"]:
    """By feature, in float32; a piece that fits a processor's cache at a time."""
    pieces = (piece.to(torch.float32, copy=True) for piece in inputs.split(_TOKENS_AT_ONCE))
    return torch.stack([piece.mul_(piece).sum(dim=0) for piece in pieces]).sum(dim=0)
