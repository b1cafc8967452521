"""Run right and wrong answers to a question; the wrong answer reuses the right answer's KV cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lcc_lens.data.batches import Batch, TokenSequence, batches, rounded_length, shared_prefix
from lcc_lens.models.hooked.activations import Site, SiteVisitor, TokenPositions, visit_sites
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.kv_cache import (
    PrefixCache,
    attention_reach,
    cache_rows,
    can_reuse_cache,
    continue_from_cache,
)


def shared_length(right: TokenSequence, wrong: TokenSequence) -> int:
    """The number of first tokens that two sequences share, less than the length of the second."""
    return shared_prefix(right.tokens, wrong.tokens[:-1])


def visit_pairs(
    prefix: PrefixCache,
    batch: Batch,
    right: Sequence[TokenSequence],
    wrong: Sequence[TokenSequence],
    places: Mapping[Site, TokenPositions],
    visit: SiteVisitor,
    visit_wrong: SiteVisitor,
    longest: int | None = None,
    watched: AbstractContextManager[None] | None = None,
) -> None:
    """Run the right answers, then the wrong ones from their first different token on; attention is causal.

    Args:
        prefix: the model, and the KV cache of the tokens that all sequences start with.
        batch: the right sequences without the prefix, padded.
        right: the right sequences, whole, in the batch's order; ``wrong``: the wrong ones.
        places: positions to read in the right sequences, counted from the prefix's end.
        visit_wrong: receives the head outputs at the last token of every wrong sequence.
        longest: tokens that a whole sequence is padded to at most; ``watched``: entered for the right answers alone.
    """
    model = prefix.model
    shared = torch.tensor([shared_length(r, w) for r, w in zip(right, wrong, strict=True)])
    rest = [TokenSequence(w.tokens[int(n) :], 1) for w, n in zip(wrong, shared, strict=True)]
    # includes padding, and the gap in rows that share fewer tokens
    span = rounded_length(int(shared.max())) + rounded_length(max(map(len, rest)))
    can_continue = span <= attention_reach(model) and can_reuse_cache(model)
    with watched or nullcontext():
        cache = prefix.visit(batch.tokens, places, visit, keep=can_continue)
    if cache is None:
        _visit_ends(model, wrong, visit_wrong, longest)
    else:
        _visit_rest(model, cache, shared, rest, visit_wrong)


def _visit_rest(
    model: HookedModel,
    cache: Any,
    shared: Int[Tensor, " pair"],
    rest: Sequence[TokenSequence],
    visit: SiteVisitor,
) -> None:
    """Run the remaining tokens from a KV cache, in batches of similar length."""
    ends = _InOrder(visit)
    for batch in batches(rest, longest=rounded_length(max(map(len, rest)))):
        index = list(batch.index)
        rows = cache_rows(cache, index, rounded_length(int(shared[index].max())))
        continue_from_cache(model, rows, shared[index], batch, ends.take(index))
    ends.pass_on()


def _visit_ends(
    model: HookedModel, sequences: Sequence[TokenSequence], visit: SiteVisitor, longest: int | None
) -> None:
    """Run whole sequences, for models that cannot reuse a KV cache."""
    ends = _InOrder(visit)
    for batch in batches(sequences, longest=longest):
        visit_sites(model, batch.tokens, {"z": TokenPositions.ends(batch)}, ends.take(batch.index))
    ends.pass_on()


class _InOrder:
    """Collects activations of several batches and passes them on in the order of the rows."""

    def __init__(self, visit: SiteVisitor) -> None:
        self.visit = visit
        self.index: list[int] = []
        self.layers: dict[int, list[Tensor]] = {}

    def take(self, index: Sequence[int]) -> SiteVisitor:
        """A visitor for the batch with these rows."""
        self.index += index
        return lambda site, layer, z: self.layers.setdefault(layer, []).append(z)

    def pass_on(self) -> None:
        """Pass the activations to the visitor, layer by layer."""
        back = torch.tensor(self.index).argsort()
        for layer, values in self.layers.items():
            self.visit("z", layer, torch.cat(values)[back.to(values[0].device)])
