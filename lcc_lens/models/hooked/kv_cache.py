"""Reuse a KV cache instead of running the same tokens again, if a model gives the same results that way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lcc_lens.data.batches import Batch, TokenSequence, pad
from lcc_lens.models.architecture.caches import cache_name, cache_of
from lcc_lens.models.architecture.context import attention_window
from lcc_lens.models.hooked.activations import Site, SiteVisitor, TokenPositions, visit_sites
from lcc_lens.models.hooked.fused_attention import fused_attention
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.hooked.self_checks import OTHER_OPERATIONS, check_tokens, is_close, tried_once
from lcc_lens.models.hooked.weights import plain_model


class PrefixCache:
    """The KV cache of the first tokens that many sequences share, computed once and reused by every batch.

    A model that gives other results from a cache runs these tokens again with every batch.

    Args:
        model: a hooked model.
        tokens: the shared tokens; may be empty.
    """

    def __init__(self, model: HookedModel, tokens: Int[Tensor, " prefix"] | None = None) -> None:
        self.model = model
        self.tokens = torch.zeros(0, dtype=torch.long) if tokens is None else tokens
        self._layers: list[tuple[Tensor, Tensor]] | None = None

    def visit(
        self,
        tokens: Int[Tensor, "batch pos"],
        places: Mapping[Site, TokenPositions],
        visit: SiteVisitor,
        *,
        keep: bool = False,
    ) -> Any:
        """Run forward over what follows the prefix (see :func:`lcc_lens.models.hooked.activations.visit_sites`).

        Args:
            tokens: right-padded, without the prefix; positions in ``places`` count from its end.
            keep: return the KV cache of all tokens, prefix included.

        Returns:
            The cache; None without ``keep``, or if the model cannot reuse one.
        """
        n_prefix = len(self.tokens)
        fits = n_prefix + tokens.shape[1] <= attention_reach(self.model)
        if not ((keep or n_prefix) and fits and can_reuse_cache(self.model)):
            whole = torch.cat([self.tokens.expand(len(tokens), -1), tokens], dim=1)
            shifted = {site: TokenPositions(p.sequence, p.position + n_prefix) for site, p in places.items()}
            visit_sites(self.model, whole, shifted, visit)
            return None
        cache = self._start(len(tokens))
        visit_sites(self.model, tokens, places, visit, past_key_values=cache)
        return cache if keep else None

    def _start(self, n: int) -> Any:
        """A cache with the prefix in each of ``n`` rows."""
        from transformers import DynamicCache

        if self._layers is None:
            cache = DynamicCache()
            if len(self.tokens):
                visit_sites(self.model, self.tokens[None], {}, _ignore, past_key_values=cache)
            self._layers = [(layer.keys, layer.values) for layer in cache.layers if len(self.tokens)]
        started = DynamicCache()
        for i, (keys, values) in enumerate(self._layers):
            started.update(keys.expand(n, -1, -1, -1), values.expand(n, -1, -1, -1), i)
        return started


def cache_rows(cache: Any, rows: Sequence[int], length: int) -> Any:
    """A new cache with some rows of another one, cut to a length where that is shorter."""
    from transformers import DynamicCache

    chosen = DynamicCache()
    for i, layer in enumerate(cache.layers):
        chosen.update(layer.keys[list(rows), :, :length], layer.values[list(rows), :, :length], i)
    return chosen


def continue_from_cache(
    model: HookedModel, cache: Any, shared: Int[Tensor, " row"], rest: Batch, visit: SiteVisitor
) -> None:
    """Run the rest of sequences whose first ``shared`` tokens are in a cache, which may hold more of each.

    The gap between a row's shared tokens and its rest is masked. ``visit`` receives the head outputs at the last token
    of every row.
    """
    is_past = torch.arange(cache.get_seq_length()) < shared[:, None]
    mask = torch.cat([is_past, rest.is_valid()], dim=1).long()
    within = torch.minimum(torch.arange(rest.tokens.shape[1]), rest.lengths[:, None] - 1)  # padding has a position, too
    positions = shared[:, None] + within
    device = device_of(model)
    visit_sites(
        model, rest.tokens, {"z": TokenPositions.ends(rest)}, visit, past_key_values=cache,
        attention_mask=mask.to(device), position_ids=positions.to(device),
    )  # fmt: skip


def attention_reach(model: HookedModel) -> float:
    """The smallest window of a layer's attention in tokens; infinite without local attention."""
    return attention_window(getattr(getattr(model, "original_model", None), "config", None))


@tried_once(on_failure=False)
def can_reuse_cache(model: HookedModel) -> bool:
    """Whether the model gives the same head outputs from another sequence's KV cache; tried once per model.

    Tried on two short sequences that share 6 and 4 tokens with those in the cache, so the second row has a gap.
    """
    from transformers import DynamicCache

    ids = torch.arange(1, 33) * 7919 % int(model.cfg.d_vocab)
    first = [ids[:9], ids[9:15]]
    whole = [torch.cat([ids[:6], ids[20:22]]), torch.cat([ids[9:13], ids[22:25]])]
    shared = torch.tensor([6, 4])
    batch, cache = pad([TokenSequence(tokens, 1) for tokens in first], (0, 1)), DynamicCache()
    visit_sites(model, batch.tokens, {}, _ignore, past_key_values=cache)
    reused: dict[int, Tensor] = {}
    rest = pad([TokenSequence(tokens[int(n) :], 1) for tokens, n in zip(whole, shared, strict=True)], (0, 1))
    continue_from_cache(
        model, cache_rows(cache, (0, 1), 6), shared, rest,
        lambda site, layer, z: reused.__setitem__(layer, z.float()),
    )  # fmt: skip
    expected: dict[int, list[Tensor]] = {}
    for tokens in whole:
        end = TokenPositions(torch.tensor([0]), torch.tensor([len(tokens) - 1]))
        visit_sites(
            model, tokens[None], {"z": end}, lambda site, layer, z: expected.setdefault(layer, []).append(z.float())
        )
    return all(is_close(reused[i], torch.cat(z), OTHER_OPERATIONS, model.cfg.dtype) for i, z in expected.items())


@tried_once(on_failure=False)
def can_continue(model: HookedModel) -> bool:
    """Whether the model reads on from its own KV cache as it reads a whole text; tried once per model.

    One that does not has to generate without a cache.
    """
    plain, tokens = plain_model(model), check_tokens(model)
    n = tokens.shape[1] // 2
    with fused_attention(model):
        first = plain(tokens[:, :n], use_cache=True)
        rest = plain(tokens[:, n:], use_cache=True, **{cache_name(plain.forward): cache_of(first)}).logits
        whole = plain(tokens, use_cache=False).logits[:, n:]
    return is_close(rest, whole, OTHER_OPERATIONS, model.cfg.dtype)


def _ignore(site: Site, layer: int, activation: Tensor) -> None:
    """Read nothing."""


@contextmanager
def plain_settings(plain: Any) -> Iterator[None]:
    """Inside the block, of the settings for generation beside the weights only the tokens that end a text count.

    Penalties and beams would hide what the weights say.
    """
    from transformers import GenerationConfig

    own = plain.generation_config
    plain.generation_config = GenerationConfig(eos_token_id=own.eos_token_id)
    try:
        yield
    finally:
        plain.generation_config = own
