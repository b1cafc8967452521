"""All selectors behind one interface: evidence in, scores out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lcc_lens.analysis.components import LostComponents
from lcc_lens.analysis.head_scores import HeadScores
from lcc_lens.analysis.selectors.activation_patching import score_activation_patching
from lcc_lens.analysis.selectors.attribution_patching import score_attribution_patching
from lcc_lens.analysis.selectors.backward import ResponseGradients, response_gradients
from lcc_lens.analysis.selectors.gradient import score_gradient
from lcc_lens.analysis.selectors.interaction_probe import score_interaction_probe
from lcc_lens.analysis.selectors.kl import score_kl
from lcc_lens.analysis.selectors.linear_probe import LayerFeatures, Solver, linear_probe_scores
from lcc_lens.analysis.selectors.mse import score_mse
from lcc_lens.analysis.selectors.names import SELECTORS, SelectorName
from lcc_lens.analysis.selectors.random import score_random
from lcc_lens.analysis.statistics import DifferenceStatistics
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.data.batches import TokenSequence
from lcc_lens.models.hooked.direct_path import OutputProjections, Unembedding
from lcc_lens.models.pair import Pair

#: Selectors that read the answers of contrastive pairs, and those that run both models again.
NEED_PAIRS: frozenset[SelectorName] = frozenset({"probe", "interaction", "kl"})
NEED_MODELS: frozenset[SelectorName] = frozenset({"attribution", "gradient", "patching"})
#: Questions that kl reads at most: each one costs two readouts of the vocabulary per head.
_KL_EXAMPLES = 16
#: What a scan gives without being asked, since it costs next to nothing.
CHEAP: tuple[SelectorName, ...] = ("probe", "interaction")


@dataclass(frozen=True)
class ScoreSettings:
    """How selectors score.

    Args:
        rank: K of the activation editing in both probes.
        solver: of the linear probe: to convergence, or the published 200 steps.
        folds: cross-validate the linear probe in so many parts (one split of 70/30 if not given).
        examples: for selectors that run the models again, and for kl; the first ones of the data.
        seed: of splits, samples and the random selector.
        batch_tokens: padded tokens per pass at most.
    """

    rank: int = 1
    solver: Solver = "newton"
    folds: int | None = None
    examples: int = 32
    seed: int = 0
    batch_tokens: int = 1024


@dataclass(frozen=True)
class Evidence:
    """Everything that a selector may look at.

    ``layers`` gives the probes' features layer by layer, anew at each call; None without right and wrong answers.
    """

    pair: Pair
    sequences: Sequence[TokenSequence]
    heads: DifferenceStatistics
    components: LostComponents
    layers: Callable[[], Iterable[LayerFeatures]] | None = None
    settings: ScoreSettings = field(default_factory=ScoreSettings)

    @cached_property
    def gradients(self) -> ResponseGradients:
        """One backward pass, shared by the selectors that read gradients."""
        self.require_models()
        chosen = self.sequences[: self.settings.examples]
        return response_gradients(self.pair, chosen, batch_tokens=self.settings.batch_tokens)

    def features(self) -> Iterable[LayerFeatures]:
        """The probes' features.

        Raises:
            RequestError: the data have no right and wrong answers.
        """
        if self.layers is None:
            raise RequestError("expected questions with right and wrong answers, got data without; name such a task")
        return self.layers()

    def require_models(self) -> None:
        """Refuse a pair that holds one model at a time.

        Raises:
            RequestError: says what to do.
        """
        if self.pair.one_at_a_time:
            raise RequestError("expected both models in memory for this selector, got one at a time; load both")


def _probe(evidence: Evidence) -> HeadScores:
    settings = evidence.settings
    rank = min(settings.rank, evidence.components.d_head)
    return linear_probe_scores(
        evidence.features(), evidence.components, rank=rank, solver=settings.solver, folds=settings.folds,
        seed=settings.seed,
    )  # fmt: skip


def _interaction(evidence: Evidence) -> HeadScores:
    rank = min(evidence.settings.rank, evidence.components.d_head)
    return score_interaction_probe(evidence.features(), evidence.components, rank=rank, seed=evidence.settings.seed)


def _attribution(evidence: Evidence) -> HeadScores:
    return score_attribution_patching(evidence.gradients)


def _patching(evidence: Evidence) -> HeadScores:
    evidence.require_models()
    chosen = evidence.sequences[: evidence.settings.examples]
    return score_activation_patching(evidence.pair, chosen, batch_tokens=2 * evidence.settings.batch_tokens)


def _mse(evidence: Evidence) -> HeadScores:
    return score_mse(evidence.heads, len(evidence.sequences))


def _kl(evidence: Evidence) -> HeadScores:
    pruned = evidence.pair.pruned
    readout, writer = Unembedding.of(pruned), OutputProjections.of(pruned)

    def logits(layer: int, z: Tensor) -> Tensor:
        by_head = [writer.output(Head(layer, head), z[:, head]) for head in range(z.shape[1])]
        return readout.logits(torch.stack(by_head, dim=1))

    layers = ((part.z_dense_question, part.z_pruned_question) for part in evidence.features())
    known = ((dense, pruned_z) for dense, pruned_z in layers if dense is not None)
    n = min(evidence.settings.examples, _KL_EXAMPLES)
    return score_kl(known, logits, max_examples=n, seed=evidence.settings.seed)


def _gradient(evidence: Evidence) -> HeadScores:
    return score_gradient(evidence.gradients, evidence.components)


def _random(evidence: Evidence) -> HeadScores:
    return score_random(evidence.pair.n_layers, evidence.pair.n_heads, evidence.settings.seed)


REGISTRY: dict[SelectorName, Callable[[Evidence], HeadScores]] = {
    "probe": _probe,
    "interaction": _interaction,
    "attribution": _attribution,
    "patching": _patching,
    "mse": _mse,
    "kl": _kl,
    "gradient": _gradient,
    "random": _random,
}


def check_selectors(names: Iterable[str]) -> tuple[SelectorName, ...]:
    """The selectors of these names, each once.

    Raises:
        RequestError: an unknown name.
    """
    known: dict[str, SelectorName] = {name: name for name in REGISTRY}
    for name in names:
        if name not in known:
            raise RequestError(f"expected some of the selectors {', '.join(SELECTORS)}, got {name!r}")
    return tuple(dict.fromkeys(known[name] for name in names))


def score(names: Iterable[SelectorName], evidence: Evidence) -> dict[str, HeadScores]:
    """The scores of several selectors from the same evidence."""
    return {name: REGISTRY[name](evidence) for name in names}
