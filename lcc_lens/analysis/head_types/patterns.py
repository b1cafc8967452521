"""Attention patterns of several models, layer by layer: what heads attend to, and how far two patterns are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lcc_lens.analysis.lens.prompt import Applicable
from lcc_lens.analysis.lens.readings import has_patterns
from lcc_lens.core.errors import RequestError
from lcc_lens.models.hooked.hooks import HookedModel, kept_hooks, pattern_name
from lcc_lens.models.hooked.layer_walk import LayerWalk
from lcc_lens.models.pair import Pair

Pattern = Float[Tensor, "batch head query key"]


@dataclass(frozen=True)
class NamedModel:
    """One of the compared models, and the block inside which it computes."""

    name: str
    model: HookedModel
    applied: Callable[[], AbstractContextManager[Any]] = nullcontext


def compared_models(pair: Pair, restoration: Applicable | None) -> list[NamedModel]:
    """The dense, the pruned and, with a restoration, the restored model.

    Raises:
        RequestError: the pair holds one model at a time, or attention patterns cannot be read.
    """
    if pair.one_at_a_time:
        raise RequestError("expected both models in memory for head types, got one at a time; load both")
    models = [NamedModel("dense", pair.dense), NamedModel("pruned", pair.pruned)]
    if restoration is not None:
        models.append(NamedModel("restored", pair.pruned, lambda: restoration.applied_to(pair.pruned)))
    if not all(has_patterns(each.model) for each in models):
        raise RequestError("expected a hook point for attention patterns, got none; use another model")
    return models


def walk_patterns(
    pair: Pair, models: list[NamedModel], tokens: Int[Tensor, "batch pos"]
) -> Iterator[dict[str, Pattern]]:
    """Layer by layer, every model's attention patterns; one layer's are in memory at a time.

    Heads are the pruned model's, in float32.
    """
    walks = [LayerWalk(each.model, [tokens]) for each in models]
    for layer in range(pair.n_layers):
        found = {}
        for each, walk in zip(models, walks, strict=True):
            with each.applied():
                found[each.name] = _next_pattern(walk)
        found["dense"] = found["dense"][:, list(pair.head_map.dense_heads[layer])]
        yield found


def _next_pattern(walk: LayerWalk) -> Pattern:
    """Compute one more layer of a walk's only batch; returns its attention patterns."""
    found: list[Tensor] = []

    def keep(pattern: Tensor, hook: Any) -> None:
        found.append(pattern.detach().float())

    with kept_hooks(walk.model, [(pattern_name(walk.layer), keep)]):  # there already when kernels are chosen
        walk.advance([], watch=lambda _: [])
    return found[-1]


def detection_masks(tokens: Int[Tensor, "batch pos"]) -> dict[str, Bool[Tensor, "batch query key"]]:
    """Where the heads of each type attend: to the previous token, to earlier copies of the current token
    (``duplicate``), and to the token after such a copy (``induction``).

    The same as TransformerLens' detection patterns (``transformer_lens.head_detector``).
    """
    n = tokens.shape[1]
    query, key = torch.arange(n, device=tokens.device)[:, None], torch.arange(n, device=tokens.device)
    duplicate = (tokens[:, :, None] == tokens[:, None, :]) & (key < query)
    after = torch.cat([torch.zeros_like(duplicate[..., :1]), duplicate[..., :-1]], dim=-1)
    return {"previous": (key == query - 1).expand_as(duplicate), "duplicate": duplicate, "induction": after}


def type_scores(
    pattern: Pattern, masks: Mapping[str, Bool[Tensor, "batch query key"]]
) -> dict[str, Float[Tensor, "batch head"]]:
    r"""The share of a head's attention at each type's places, $\sum_{qk} p_{qk} m_{qk} / \sum_{qk} p_{qk}$."""
    total = pattern.sum((-2, -1))
    return {name: (pattern * mask[:, None].to(pattern)).sum((-2, -1)) / total for name, mask in masks.items()}


def pattern_measures(
    pattern: Pattern, dense: Pattern, lengths: Int[Tensor, " batch"]
) -> dict[str, Float[Tensor, "batch head"]]:
    r"""Measures of attention patterns, as means over the tokens of every sequence but its first.

    ``sink`` is the weight on the first token, ``entropy`` $-\sum_k p_k \ln p_k$, ``distance`` the mean number of tokens
    looked back; ``total_variation`` $\frac12 \sum_k |p_k - p^{dense}_k|$ and ``jensen_shannon``, in nats, say how far
    the pattern is from the dense model's.
    """
    n = pattern.shape[-1]
    position = torch.arange(n, device=pattern.device)
    back = (position[:, None] - position).clamp_min(0).to(pattern)
    middle = (pattern + dense) / 2
    by_query = {
        "sink": pattern[..., 0],
        "entropy": -_x_log_x(pattern),
        "distance": (pattern * back).sum(-1),
        "total_variation": (pattern - dense).abs().sum(-1) / 2,
        "jensen_shannon": ((_x_log_x(pattern) + _x_log_x(dense)) / 2 - _x_log_x(middle)).clamp_min(0),
    }
    counted = ((position > 0) & (position < lengths.to(pattern.device)[:, None])).to(pattern)[:, None]
    n_counted = counted.sum(-1).clamp_min(1)
    return {name: (values * counted).sum(-1) / n_counted for name, values in by_query.items()}


def _x_log_x(p: Pattern) -> Float[Tensor, "batch head query"]:
    total: Tensor = torch.special.xlogy(p, p).sum(-1)
    return total
