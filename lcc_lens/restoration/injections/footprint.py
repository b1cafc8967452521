"""The footprint of an injection: where it acts, what it trains, and what a checkpoint needs to hold it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lcc_lens.models.hooked.sites import CONSTANT_SITES, ConstantSite


@dataclass(frozen=True)
class Footprint:
    """What an injection changes and costs, known before anything is trained.

    A checkpoint can hold it if the linear layers behind each site of ``biases`` can hold a bias and ``n_beside`` is 0;
    changed weights need nothing. How many parameters the biases add depends on the checkpoint (it may have them
    already, or need others with them): :func:`lcc_lens.evaluation.comparison.costs.merging_costs` counts them.
    """

    biases: tuple[ConstantSite, ...] = ()
    """Sites whose linear layers (output projections, down projections) need a bias for the constant."""
    weights: tuple[str, ...] = ()
    """Plain names of modules whose weights change; zeros stay."""
    n_trained: int = 0
    """Trained parameters."""
    n_beside: int = 0
    """Parameters that stay beside the weights at inference; 0 for everything that folds."""

    @property
    def folds(self) -> bool:
        """Whether the checkpoint needs no tensors beyond its architecture's."""
        return self.n_beside == 0

    @classmethod
    def joined(cls, footprints: Iterable[Footprint]) -> Footprint:
        """The footprint of several injections together."""
        footprints = list(footprints)
        sites = {site for footprint in footprints for site in footprint.biases}
        return cls(
            biases=tuple(site for site in CONSTANT_SITES if site in sites),
            weights=tuple(dict.fromkeys(name for footprint in footprints for name in footprint.weights)),
            n_trained=sum(footprint.n_trained for footprint in footprints),
            n_beside=sum(footprint.n_beside for footprint in footprints),
        )
