"""Registry of selectors: functions that score every attention head from the evidence of a scan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lcc_lens.analysis.head_scores import HeadScores
from lcc_lens.analysis.selectors.activation_patching import score_activation_patching
from lcc_lens.analysis.selectors.attribution_patching import score_attribution_patching
from lcc_lens.analysis.selectors.evidence import Evidence
from lcc_lens.analysis.selectors.gradient import score_gradient
from lcc_lens.analysis.selectors.interaction_probe import score_interaction_probe
from lcc_lens.analysis.selectors.kl import score_kl
from lcc_lens.analysis.selectors.linear_probe import linear_probe_scores
from lcc_lens.analysis.selectors.mse import score_mse
from lcc_lens.analysis.selectors.names import SELECTORS
from lcc_lens.analysis.selectors.own import score_own
from lcc_lens.analysis.selectors.random import score_random
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.core.ranges import ranged
from lcc_lens.core.registry import Registry
from lcc_lens.models.hooked.direct_path import OutputProjections, Unembedding

#: What a selector may need besides statistics and lost components.
NEEDS = ("pairs", "models", "gradients", "causes")
ScoreFunction = Callable[[Evidence], HeadScores]
_GRADIENTS = ("models", "gradients")
#: Maximum number of questions for kl; each one unembeds the output of every head twice.
_KL_EXAMPLES = 16


@dataclass(frozen=True)
class Selector:
    """A function that scores every head, and what it needs besides statistics and lost components.

    A scan refuses a selector before any forward pass if a need is not met: ``pairs``, questions with right and wrong
    answers (at least 4, of both labels), ``models``, both models in memory, ``gradients``, at least two examples to run
    them on, or ``causes``, the causes of differences.
    """

    score: ScoreFunction
    needs: Collection[str] = ()

    def __post_init__(self) -> None:
        for need in self.needs:
            if need not in NEEDS:
                raise RequestError(f"expected needs among {', '.join(NEEDS)}, got {need!r}; correct the name")


def _probe(evidence: Evidence) -> HeadScores:
    settings = evidence.settings
    return linear_probe_scores(
        evidence.features(), evidence.components, rank=settings.rank, solver=settings.solver, folds=settings.folds,
        seed=settings.seed,
    )  # fmt: skip


def _interaction(evidence: Evidence) -> HeadScores:
    features, settings = evidence.features(), evidence.settings
    return score_interaction_probe(features, evidence.components, rank=settings.rank, seed=settings.seed)


def _patching(evidence: Evidence) -> HeadScores:
    evidence.require_models()
    batch_tokens = 2 * evidence.settings.batch_tokens
    return score_activation_patching(evidence.pair, evidence.first_sequences, batch_tokens=batch_tokens)


def _kl(evidence: Evidence) -> HeadScores:
    pruned = evidence.pair.pruned
    unembedding, projections = Unembedding.of(pruned), OutputProjections.of(pruned)

    def logits(layer: int, z: Tensor) -> Tensor:
        by_head = [projections.output(Head(layer, head), z[:, head]) for head in range(z.shape[1])]
        return unembedding.logits(torch.stack(by_head, dim=1))

    questions = (
        (layer.z_dense_question, layer.z_pruned_question)
        for layer in evidence.features()
        if layer.z_dense_question is not None
    )
    n_examples = min(evidence.settings.examples, _KL_EXAMPLES)
    return score_kl(questions, logits, max_examples=n_examples, seed=evidence.settings.seed)


REGISTRY: Registry[Selector | ScoreFunction] = Registry(
    "selector",
    {
        "probe": Selector(_probe, ["pairs"]),
        "interaction": Selector(_interaction, ["pairs"]),
        "attribution": Selector(lambda evidence: score_attribution_patching(evidence.gradients), _GRADIENTS),
        "patching": Selector(_patching, ["models"]),
        "mse": Selector(lambda evidence: score_mse(evidence.heads, len(evidence.sequences))),
        "kl": Selector(_kl, ["pairs"]),
        "gradient": Selector(lambda evidence: score_gradient(evidence.gradients, evidence.components), _GRADIENTS),
        "own": Selector(score_own, ["models", "causes"]),
        "random": Selector(lambda e: score_random(e.pair.n_layers, e.pair.n_heads, e.settings.seed)),
    },
)


@ranged
def register_selector(
    name: str, function: ScoreFunction, *, needs: Collection[str] = (), replace: bool = False
) -> None:
    """Add a selector, which then works like the built-in ones: ``scan(..., selectors=[name])``, ``scan.select(name)``.

    An installed package adds one by an entry point of the group ``lcc_lens.selectors``, which names the function or a
    :class:`Selector`; the command line knows it too.

    Args:
        name: lower-case letters, digits, ``-`` and ``_``.
        function: takes an :class:`~lcc_lens.analysis.selectors.evidence.Evidence` and returns the score and standard
            error of every head, ``[layer, head]``; heads with higher scores are restored first.
        needs: ``pairs`` if it reads right and wrong answers (``evidence.features()``), ``models`` if it runs both
            models or reads gradients, ``gradients`` beside it if it reads them, ``causes`` if it reads
            ``evidence.causes``. A scan that lacks them is refused before its passes.
        replace: allow a name that was registered before; the built-in selectors cannot be replaced.

    Raises:
        RequestError: the name has another form or is taken, or a need is unknown.

    Example:
        >>> def lost_cosine(evidence):
        ...     loss = 1 - evidence.heads.cosine
        ...     return HeadScores("cosine", loss, loss * float("nan"), len(evidence.sequences))
        >>> register_selector("cosine", lost_cosine)  # doctest: +SKIP
        >>> scan(pair, data, selectors=["cosine"]).select("cosine", share=0.1)  # doctest: +SKIP
        [Head(layer=0, head=4), Head(layer=2, head=1)]
    """
    REGISTRY.register(name, Selector(function, frozenset(needs)), replace=replace and name not in SELECTORS)


def named_selector(name: str) -> Selector:
    """The selector of a name."""
    entry = REGISTRY[name]
    return entry if isinstance(entry, Selector) else Selector(entry)


def check_selectors(names: Iterable[str]) -> tuple[str, ...]:
    """The names, each once.

    Raises:
        RequestError: an unknown name; says the nearest one.
    """
    unique = tuple(dict.fromkeys(names))
    for name in unique:
        REGISTRY[name]
    return unique


def score(names: Iterable[str], evidence: Evidence) -> dict[str, HeadScores]:
    """The scores of several selectors from the same evidence.

    Raises:
        RequestError: a selector returned anything but a score and a standard error per head.
    """
    return {name: _checked(name, named_selector(name).score(evidence), evidence.heads.mse.shape) for name in names}


def _checked(name: str, scores: HeadScores, shape: torch.Size) -> HeadScores:
    if not isinstance(scores, HeadScores) or not scores.value.shape == scores.stderr.shape == shape:
        shapes = f"{list(scores.value.shape)}" if isinstance(scores, HeadScores) else type(scores).__name__
        raise RequestError(
            f"expected HeadScores of shape {list(shape)} from the selector {name!r}, got {shapes}; correct its function"
        )
    return replace(scores, selector=name)
