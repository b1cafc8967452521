"""Activation patching: the effect of replacing one head output of the pruned model by the dense model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lcc_lens.analysis.head_scores import HeadScores
from lcc_lens.analysis.selectors.patched_run import PatchedPositions, PatchedRuns
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.heads import Head, all_heads, check_heads
from lcc_lens.core.progress import track
from lcc_lens.data.batches import Batch, TokenSequence, batches
from lcc_lens.models.hooked.layer_walk import can_start_at_layers
from lcc_lens.models.pair import Pair

OutcomeName = Literal["response", "kl"]
_OUTCOMES = ("response", "kl")


@dataclass(frozen=True)
class PatchingEffects:
    """Effect of every patched head on every example, in nats per response token; NaN for heads that were not patched.

    ``log_likelihood`` is the increase of the response's mean log-likelihood over the unpatched pruned model's,
    ``divergence`` the decrease of the KL divergence from the dense model. Positive is better in both.
    """

    log_likelihood: Float[Tensor, "example layer head"]
    divergence: Float[Tensor, "example layer head"] | None

    def scores(self, outcome: OutcomeName = "response", settings: dict[str, object] | None = None) -> HeadScores:
        """The mean effect of each head with its standard error over examples."""
        if outcome not in _OUTCOMES:
            raise RequestError(f"expected the outcome {' or '.join(_OUTCOMES)}, got {outcome!r}; choose one")
        effects = self.log_likelihood if outcome == "response" else self.divergence
        if effects is None:
            raise RequestError("expected effects on the KL divergence, got none; measure them with divergence=True")
        return HeadScores.from_examples("patching", effects, {"outcome": outcome, **(settings or {})})


def score_activation_patching(
    pair: Pair,
    sequences: Sequence[TokenSequence],
    *,
    heads: Iterable[Head | tuple[int, int]] | None = None,
    positions: PatchedPositions = "all",
    batch_tokens: int = 2048,
    outcome: OutcomeName = "response",
    on_done: Callable[[PatchingEffects], None] | None = None,
) -> HeadScores:
    """Score heads by the increase in log-likelihood when the pruned model gets the dense model's output of that head.

    The gold standard for other selectors: no linearisation, no probe. It takes a forward pass from the head's layer on
    for every head and example; :func:`~lcc_lens.analysis.selectors.attribution_patching.score_attribution_patching`
    estimates the same from one backward pass.

    Args:
        heads: the heads to patch (all if not given); the others score NaN.
        positions: patch at ``all`` positions, or in the ``response`` only: from the question's last token on.
        batch_tokens: padded tokens per forward pass at most; decides speed and memory.
        outcome: ``response``, the increase of the response's mean log-likelihood, or ``kl``, the decrease of the KL
            divergence from the dense model at the positions that predict it; both in nats per token.
        on_done: called after every batch of examples with the effects so far (NaN if not computed yet).

    Raises:
        RequestError: no example, a head outside the model, or an unknown name.
        LensError: an effect is NaN or infinite (names layer and head).

    Reference: Meng et al., "Locating and Editing Factual Associations in GPT" (arXiv 2202.05262), section 2; Zhang and
    Nanda, "Towards Best Practices of Activation Patching" (arXiv 2309.16042).
    """
    effects = patching_effects(
        pair, sequences, heads=heads, positions=positions, batch_tokens=batch_tokens,
        divergence=outcome == "kl", on_done=on_done,
    )  # fmt: skip
    return effects.scores(outcome, {"positions": positions})


def patching_effects(
    pair: Pair,
    sequences: Sequence[TokenSequence],
    *,
    heads: Iterable[Head | tuple[int, int]] | None = None,
    positions: PatchedPositions = "all",
    batch_tokens: int = 2048,
    divergence: bool = True,
    on_done: Callable[[PatchingEffects], None] | None = None,
) -> PatchingEffects:
    """The effect of every head on every example (see :func:`score_activation_patching`).

    The rows of a forward pass are (example, head) pairs of one layer. It starts at that layer from the pruned model's
    residual stream, if the model gives the same logits that way (tested on a few tokens first).

    Args:
        divergence: also measure the KL divergence from the dense model, which takes two more passes over the logits.
    """
    if not sequences:
        raise RequestError("expected at least one example to patch, got none; add data")
    if positions not in ("all", "response"):
        raise RequestError(f"expected positions all or response, got {positions!r}; choose one")
    everything = all_heads(pair.n_layers, pair.n_heads)
    chosen = everything if heads is None else check_heads(heads, pair.n_layers, pair.n_heads)
    effects = _empty(len(sequences), pair, chosen, divergence)
    alive = [head for head in chosen if head.head not in pair.head_map.removed[head.layer]]
    may_start = can_start_at_layers(pair.pruned)
    prepare = partial(PatchedRuns.prepare, pair, positions=positions, may_start=may_start, divergence=divergence)
    patch_heads(batches(sequences, max_tokens=batch_tokens), alive, prepare, effects, batch_tokens, on_done)
    return effects


def patch_heads(
    grouped: Sequence[Batch],
    heads: Sequence[Head],
    prepare: Callable[[Batch], PatchedRuns],
    effects: PatchingEffects,
    batch_tokens: int,
    on_done: Callable[[PatchingEffects], None] | None = None,
) -> None:
    """Patch every head in every batch and write the effects into ``effects``.

    Args:
        prepare: runs the models over a batch before its heads are patched.
        batch_tokens: padded tokens per forward pass at most.
        on_done: called after every batch.
    """
    steps = [step for batch in grouped for step in _plan(batch, heads, batch_tokens)]
    runs: PatchedRuns | None = None
    for step in track(steps, len(steps), "patch heads"):
        if runs is None or runs.batch is not step.batch:
            if runs is not None and on_done is not None:
                on_done(effects)
            runs = None  # frees the last batch's activations before the next one's are computed
            runs = prepare(step.batch)
        _measure_step(runs, step, effects)
    if on_done is not None:
        on_done(effects)


class _Step(NamedTuple):
    """One forward pass: its rows are examples of a batch, each with a head of the layer to patch."""

    batch: Batch
    layer: int
    example: Int[Tensor, " row"]
    head: Int[Tensor, " row"]


def _plan(batch: Batch, heads: Sequence[Head], batch_tokens: int) -> list[_Step]:
    """Cut the (example, head) pairs of each layer into forward passes of nearly equal size."""
    n_examples, length = batch.tokens.shape
    most = max(1, batch_tokens // length)
    steps = []
    for layer in sorted({head.layer for head in heads}):
        in_layer = torch.tensor([head.head for head in heads if head.layer == layer])
        rows = torch.cartesian_prod(torch.arange(n_examples), in_layer)
        parts = rows.tensor_split(math.ceil(len(rows) / most))
        steps += [_Step(batch, layer, example=part[:, 0], head=part[:, 1]) for part in parts]
    return steps


def _empty(n_examples: int, pair: Pair, chosen: Sequence[Head], divergence: bool) -> PatchingEffects:
    """Initial effects: NaN, but 0 for chosen heads that pruning removed whole, which are not run."""

    def empty() -> Tensor:
        values = torch.full((n_examples, pair.n_layers, pair.n_heads), math.nan)
        for layer, head in chosen:
            if head in pair.head_map.removed[layer]:
                values[:, layer, head] = 0.0
        return values

    return PatchingEffects(empty(), empty() if divergence else None)


def _measure_step(runs: PatchedRuns, step: _Step, effects: PatchingEffects) -> None:
    """Run one step and write its effects into the result."""
    patched, unpatched = runs.run(step.layer, step.example, step.head), runs.unpatched
    where = torch.tensor(step.batch.index)[step.example], torch.tensor(step.layer), step.head

    def change(after: Tensor, before: Tensor) -> Tensor:
        changed = (after - before[step.example.to(before.device)]).cpu()
        bad = (~torch.isfinite(changed)).nonzero()
        if len(bad):
            head = Head(step.layer, int(step.head[int(bad[0])]))
            raise LensError(f"expected finite effects, got NaN or infinity after patching {head}; check the weights")
        return changed

    effects.log_likelihood[where] = change(patched.log_likelihood, unpatched.log_likelihood)
    if effects.divergence is not None and patched.divergence is not None and unpatched.divergence is not None:
        effects.divergence[where] = -change(patched.divergence, unpatched.divergence)
