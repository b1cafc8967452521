"""What an injection declares: where it acts, what it trains, and what a checkpoint needs to carry it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lcc_lens.models.hooked.sites import CONSTANT_SITES, ConstantSite


@dataclass(frozen=True)
class Footprint:
    """What an injection touches and costs, known before anything is trained.

    A checkpoint carries it if the maps that read each site of ``biases`` can hold a bias, and if there is nothing
    ``n_beside``; changed weights need nothing. How many numbers the biases add depends on the checkpoint (it may have
    them already, or bring others along): :func:`lcc_lens.evaluation.comparison.costs.merging_costs` counts them.
    """

    biases: tuple[ConstantSite, ...] = ()
    """Sites whose reading maps (output projections, down projections) need a bias for what is added."""
    weights: tuple[str, ...] = ()
    """Modules whose weights change under their zero pattern, by plain name."""
    n_trained: int = 0
    """Numbers that training moves."""
    n_beside: int = 0
    """Numbers that stay beside the weights at inference; 0 for all that folds."""

    @property
    def folds(self) -> bool:
        """Whether nothing is left of it at inference but tensors of the architecture's own."""
        return self.n_beside == 0

    @classmethod
    def joined(cls, footprints: Iterable[Footprint]) -> Footprint:
        """That of several injections at once."""
        every = list(footprints)
        touched = {site for one in every for site in one.biases}
        return cls(
            biases=tuple(site for site in CONSTANT_SITES if site in touched),
            weights=tuple(dict.fromkeys(name for one in every for name in one.weights)),
            n_trained=sum(one.n_trained for one in every),
            n_beside=sum(one.n_beside for one in every),
        )
