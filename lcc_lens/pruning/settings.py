"""How to prune, independent of model and data."""

from __future__ import annotations

from dataclasses import dataclass

from lcc_lens.errors import RequestError
from lcc_lens.pruning.masks import Pattern, Scope
from lcc_lens.pruning.pruners import PRUNERS, LayerPruner, Method


@dataclass(frozen=True)
class PruneConfig:
    """What to remove and by which scores.

    Args:
        method: the pruner.
        pattern: how much goes and where.
        scope: within what unstructured scores compete; ``matrix`` for magnitude only.
        seed: seed that chose the calibration sequences, kept for the record: pruning itself draws nothing.
        batch_size: calibration sequences per forward pass.

    Raises:
        RequestError: an unknown method or scope, a scope that the method does not have, or an empty batch.

    Example:
        >>> from lcc_lens.pruning import Unstructured
        >>> PruneConfig("wanda", Unstructured(0.5)).uses_inputs
        True
    """

    method: Method
    pattern: Pattern
    scope: Scope = "row"
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.method not in PRUNERS:
            raise RequestError(f"wanted the method {' or '.join(PRUNERS)}, got {self.method!r}; choose one of these")
        if self.scope not in ("row", "matrix"):
            raise RequestError(f"wanted the scope row or matrix, got {self.scope!r}; choose one of these")
        if self.scope == "matrix" and self.method != "magnitude":
            raise RequestError(
                f"wanted the scope row for {self.method}, got matrix; leave it out, scores compare within one row"
            )
        if self.batch_size < 1:
            raise RequestError(f"wanted a batch size of at least 1, got {self.batch_size}; raise it")

    @property
    def uses_inputs(self) -> bool:
        """Whether the method needs calibration data."""
        return PRUNERS[self.method].uses_inputs

    def pruner(self) -> LayerPruner:
        """A fresh pruner for one layer."""
        return PRUNERS[self.method](self.pattern, self.scope)
