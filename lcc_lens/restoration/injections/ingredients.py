"""What injections are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lcc_lens.analysis.components import LostComponents
from lcc_lens.analysis.statistics import DifferenceStatistics
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.data.batches import TokenSequence
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.pair import Pair
from lcc_lens.restoration.injections.constants import Start


@dataclass(frozen=True)
class Ingredients:
    """What injections are made of.

    ``components`` are the pair's lost components (None where no scan is needed), ``projections`` the output
    projections' plain names by layer, ``rank`` the directions per head (K; all if None), ``low_rank`` the rank of a
    masked low rank. ``mlp`` are a scan's statistics of the MLP's post-activation, ``mlp_rank`` the directions per MLP
    (all that the scan holds if None). ``pair`` and ``sequences`` are for what is measured in both models.
    """

    model: HookedModel
    components: LostComponents | None
    heads: Sequence[Head]
    projections: Sequence[str]
    rank: int | None = None
    start: Start = "zero"
    low_rank: int = 8
    seed: int = 0
    mlp: DifferenceStatistics | None = None
    mlp_rank: int | None = None
    pair: Pair | None = None
    sequences: Sequence[TokenSequence] = ()

    def lost(self) -> LostComponents:
        """The lost components of the heads.

        Raises:
            RequestError: there is no scan.
        """
        if self.components is None:
            raise RequestError("expected a scan of the pair for a method of constants, got none; scan it first")
        return self.components

    def lost_mlp(self, *, directions: bool) -> LostComponents:
        """The lost components of the MLPs, one part per layer.

        Args:
            directions: whether any are needed; the mean and the size come with every scan of the site.

        Raises:
            RequestError: the scan has none, or lacks directions.
        """
        if self.mlp is None:
            raise RequestError(
                "expected a scan with the MLP's post-activation (sites z mlp), got one without; scan again, or "
                "leave the "
                "MLP out where the two models' MLPs differ in width"
            )
        found = self.mlp.components()
        if directions and not found.n_held:
            raise RequestError(
                "expected the MLP's lost directions, got a scan without them; scan again with its spectrum "
                "(--spectra z "
                "mlp), or restore by mlp-offset"
            )
        return found

    def mlps(self) -> list[Head]:
        """The MLP of every layer as a part: head 0."""
        return [Head(layer, 0) for layer in range(int(self.model.cfg.n_layers))]

    def both(self) -> Pair:
        """The pair.

        Raises:
            RequestError: none was given.
        """
        if self.pair is None:
            raise RequestError(
                "expected a pair of models to measure a sequential mean shift in, got none; hand it over"
            )
        return self.pair
