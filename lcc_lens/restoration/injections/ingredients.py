"""The inputs from which injections are built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lcc_lens.analysis.components import LostComponents
from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.analysis.statistics import DifferenceStatistics
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.data.batches import TokenSequence
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.pair import Pair
from lcc_lens.restoration.injections.constants import Start


@dataclass(frozen=True)
class Ingredients:
    """The inputs from which injections are built."""

    model: HookedModel
    components: LostComponents | None
    """The heads' lost components; None without a scan."""
    heads: Sequence[Head]
    projections: Sequence[str]
    """The output projections' plain names, by layer."""
    rank: int | None = None
    """Directions per head (K); all if None."""
    start: Start = "zero"
    low_rank: int = 8
    """Rank of low-rank changes of weights."""
    seed: int = 0
    mlp: DifferenceStatistics | None = None
    """A scan's statistics of the MLP's post-activation."""
    mlp_rank: int | None = None
    """Directions per MLP; all that the scan has if None."""
    pair: Pair | None = None
    """Both models, for methods that run both."""
    sequences: Sequence[TokenSequence] = ()
    """Training data, for methods that measure activations."""
    adapter_rank: int = 8
    """Rank of the baselines' adapters."""

    @classmethod
    def of(
        cls,
        pair: Pair,
        scan: Scan | None,
        heads: Sequence[Head],
        *,
        model: HookedModel | None = None,
        sequences: Sequence[TokenSequence] = (),
        rank: int | None = None,
        mlp_rank: int | None = None,
        low_rank: int = 8,
        adapter_rank: int = 8,
        start: Start = "zero",
        seed: int = 0,
    ) -> Ingredients:
        """Collect the inputs from a pair and its scan; ``model`` is the pair's pruned one if not given."""
        return cls(
            pair.pruned if model is None else model, None if scan is None else scan.components, heads,
            pair.output_projections, rank, start, low_rank, seed, None if scan is None else scan.others.get("mlp"),
            mlp_rank, pair, sequences, adapter_rank,
        )  # fmt: skip

    def lost(self) -> LostComponents:
        """The lost components of the heads."""
        if self.components is None:
            raise RequestError("expected a scan of the pair for a method of constants, got none; scan it first")
        return self.components

    def lost_mlp(self, *, directions: bool) -> LostComponents:
        """The lost components of the MLPs, one part per layer.

        Args:
            directions: whether directions are needed; every scan of the site has the mean difference and its size.
        """
        if self.mlp is None:
            raise RequestError(
                "expected a scan with the MLP's post-activation (sites z mlp), got one without; scan again, or leave "
                "the MLP out where the two models' MLPs differ in width"
            )
        lost = self.mlp.components()
        if directions and not lost.n_held:
            raise RequestError(
                "expected the MLP's lost directions, got a scan without them; scan again with its spectrum "
                "(--spectra z mlp), or restore by mlp-offset"
            )
        return lost

    def mlps(self) -> list[Head]:
        """The MLP of every layer, as head 0."""
        return [Head(layer, 0) for layer in range(int(self.model.cfg.n_layers))]

    def both(self) -> Pair:
        """The pair."""
        if self.pair is None:
            raise RequestError("expected both models, got the pruned one; build from Ingredients.of(pair, ...)")
        return self.pair
