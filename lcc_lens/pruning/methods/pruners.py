"""Interface of a pruning method for one decoder layer, and the pruners that only need a score per weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lcc_lens.core.errors import LensError
from lcc_lens.models.architecture.anatomy import LayerAnatomy
from lcc_lens.models.architecture.sparsity_patterns import Pattern
from lcc_lens.pruning.methods.masks import Scope, keep_mask
from lcc_lens.pruning.methods.scores import magnitude_score, wanda_score

# Tokens whose squares are summed at once: few enough for a processor's cache.
_TOKENS_AT_ONCE = 256

Choice = Literal["error", "magnitude", "random"]
Split = Literal["error", "spared", "proportional"]


@dataclass(frozen=True)
class LayerTask:
    """What to prune in one decoder layer."""

    pattern: Pattern
    """How many weights to remove and where; a structured method removes this fraction of the layer's weights."""
    scope: Scope = "row"
    """Whether unstructured scores are compared within a row or within the whole weight matrix."""
    anatomy: LayerAnatomy | None = None
    """Heads and neurons of the layer, for structured methods."""
    choice: Choice = "error"
    """How a structured method chooses heads and neurons: by error, or one of the controls."""
    split: Split = "spared"
    """How a structured method divides the fraction between heads and neurons."""
    multiple: int = 1
    """A structured method removes neurons in multiples of this."""
    allowed_groups: frozenset[int] | None = None
    """Numbers of key-value groups that may be removed; any number if None."""
    seed: int = 0
    """Seed for methods that draw random numbers; it differs from layer to layer."""


@dataclass(frozen=True)
class Removed:
    """Heads, key-value groups and neurons removed from one layer, as positions in the dense layer."""

    heads: Int[Tensor, " head"] = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    groups: Int[Tensor, " group"] = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    neurons: Int[Tensor, " neuron"] = field(default_factory=lambda: torch.empty(0, dtype=torch.long))


@runtime_checkable
class LayerPruner(Protocol):
    """A pruning method at work on one decoder layer.

    It works on a whole layer, since a structured method removes matching rows and columns of several weight matrices.
    Weight matrices are identified by the names of their tensors in the checkpoint.
    """

    def observe(self, name: str, inputs: Float[Tensor, "token in"]) -> None:
        """Read a batch of inputs of a linear layer, in the compute format; called many times before `pruned`."""

    def pruned(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the new float32 weight ``[out, in]`` of every linear layer that changes.

        Args:
            weights: float32 weights ``[out, in]`` of the layer's linear layers, read from disk on access.
        """

    def removed(self) -> Removed:
        """Heads and neurons that were removed; called after `pruned`."""


@runtime_checkable
class PrunerFactory(Protocol):
    """Makes one :class:`LayerPruner` per decoder layer; the classes of this package are their own factories."""

    @property
    def uses_inputs(self) -> bool:
        """Whether the method needs calibration data; if not, the model never runs."""

    def __call__(self, task: LayerTask) -> LayerPruner:
        """Make the pruner of one layer."""


class MaskPruner(ABC):
    """Sets the weights with the lowest scores to zero and leaves all others as they are."""

    uses_inputs: ClassVar[bool] = False

    def __init__(self, task: LayerTask) -> None:
        self._task = task

    def observe(self, name: str, inputs: Float[Tensor, "token in"]) -> None:  # noqa: B027
        """Ignore the inputs; methods that use them override this."""

    @abstractmethod
    def score(self, name: str, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The importance of every weight of a linear layer."""

    def pruned(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight matrix with its lowest-scored weights set to zero."""
        for name, weight in weights.items():
            keep = keep_mask(self.score(name, weight), self._task.pattern, self._task.scope)
            yield name, torch.where(keep, weight, 0)

    def removed(self) -> Removed:
        """No heads and no neurons."""
        return Removed()


class MagnitudePruner(MaskPruner):
    """Removes the smallest weights, per output row or per weight matrix; needs no data."""

    def score(self, name: str, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The absolute values of the weights."""
        return magnitude_score(weight)


class WandaPruner(MaskPruner):
    """Removes the weights with the smallest product of size and input norm in every output row.

    Reference:
        Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models".
    """

    uses_inputs: ClassVar[bool] = True

    def __init__(self, task: LayerTask) -> None:
        super().__init__(task)
        self._sum_of_squares: dict[str, Float[Tensor, " in"]] = {}

    def observe(self, name: str, inputs: Float[Tensor, "token in"]) -> None:
        """Add the squares of each input feature, in float32."""
        squares = _sum_of_squares(inputs)
        self._sum_of_squares[name] = self._sum_of_squares[name] + squares if name in self._sum_of_squares else squares

    def score(self, name: str, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The weights' sizes times their inputs' norms."""
        if name not in self._sum_of_squares:
            raise LensError(f"expected calibration inputs of {name}, got none; the architecture is not supported")
        norm = self._sum_of_squares[name].sqrt()
        if not bool(torch.isfinite(norm).all()):
            raise LensError(f"expected finite inputs of {name}, got NaN or infinity; compute in float32")
        return wanda_score(weight, norm)


def _sum_of_squares(inputs: Float[Tensor, "token in"]) -> Float[Tensor, " in"]:
    """Sum of squares of every feature, in float32."""
    pieces = (piece.to(torch.float32, copy=True) for piece in inputs.split(_TOKENS_AT_ONCE))
    return torch.stack([piece.mul_(piece).sum(dim=0) for piece in pieces]).sum(dim=0)
