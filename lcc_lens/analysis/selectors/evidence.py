"""Inputs of a selector: statistics, lost components, probe features, both models and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated

from lcc_lens.analysis.causes.causes import Causes
from lcc_lens.analysis.components import LostComponents
from lcc_lens.analysis.selectors.backward import ResponseGradients, response_gradients
from lcc_lens.analysis.selectors.linear_probe import LayerFeatures, Solver, check_solver
from lcc_lens.analysis.statistics import DifferenceStatistics
from lcc_lens.core.errors import RequestError
from lcc_lens.core.ranges import Count, Range, Seed, check_numbers
from lcc_lens.data.batches import TokenSequence
from lcc_lens.models.pair import Pair


@dataclass(frozen=True)
class ScoreSettings:
    """Settings of the selectors.

    Args:
        rank: K, the number of lost directions that both probes edit activations with.
        solver: of the linear probe: to convergence, or the published 200 steps.
        folds: number of cross-validation folds of the linear probe (one 70/30 split if None).
        examples: maximum number of examples for kl and for selectors that run the models again.
        seed: of splits, samples and the random selector.
        batch_tokens: maximum number of padded tokens per forward pass.
    """

    rank: Count = 1
    solver: Solver = "newton"
    folds: Annotated[int, Range(2)] | None = None
    examples: Count = 32
    seed: Seed = 0
    batch_tokens: Count = 1024

    def __post_init__(self) -> None:
        check_numbers(self)
        check_solver(self.solver)


@dataclass(frozen=True)
class Evidence:
    """Everything that a selector may read.

    Attributes:
        pair: the hooked models.
        sequences: the scanned token sequences, with the right answers.
        heads: statistics of the head outputs.
        components: lost components of the heads.
        layers: gives the probe features layer by layer, from the first layer at each call; None where the data have no
            right and wrong answers.
        settings: of the scan.
        causes: of every head's difference; None if the scan did not divide them.
    """

    pair: Pair
    sequences: Sequence[TokenSequence]
    heads: DifferenceStatistics
    components: LostComponents
    layers: Callable[[], Iterable[LayerFeatures]] | None = None
    settings: ScoreSettings = field(default_factory=ScoreSettings)
    causes: Causes | None = None

    @cached_property
    def gradients(self) -> ResponseGradients:
        """Gradients of the responses' log-likelihood; computed once for all selectors that read them."""
        self.require_models()
        return response_gradients(self.pair, self.first_sequences, batch_tokens=self.settings.batch_tokens)

    @property
    def first_sequences(self) -> Sequence[TokenSequence]:
        """The first sequences, for selectors that run the models again."""
        return self.sequences[: self.settings.examples]

    def features(self) -> Iterable[LayerFeatures]:
        """The probe features, layer by layer.

        Raises:
            RequestError: the data have no right and wrong answers.
        """
        if self.layers is None:
            raise RequestError("expected questions with right and wrong answers, got none in data; scan other data")
        return self.layers()

    def require_models(self) -> None:
        """Refuse a pair with one model in memory at a time.

        Raises:
            RequestError: the pair holds one model at a time.
        """
        if self.pair.one_at_a_time:
            raise RequestError("expected both models in memory for this selector, got one at a time; load both")
