"""One text in one hooked model: head outputs, attention patterns and next-token probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lcc_lens.models.hooked.forward import forward
from lcc_lens.models.hooked.hooks import HookedModel, before_unembed, kept_hooks, pattern_name, readers, z_readers
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.pair import Pair


@dataclass(frozen=True)
class Reading:
    """What one model makes of one text, in float32 on the CPU.

    ``probabilities`` are those of the token that follows the text. ``patterns`` is None where the model has no hook
    point for its attention patterns, or where they were not asked for.
    """

    z: Float[Tensor, "pos layer head d_head"]
    probabilities: Float[Tensor, " d_vocab"]
    patterns: Float[Tensor, "layer head query key"] | None


def has_patterns(model: HookedModel) -> bool:
    """Whether a model has a hook point for the attention patterns of every layer."""
    points = model.hook_dict
    return all(pattern_name(layer) in points for layer in range(int(model.cfg.n_layers)))


def read_text(model: HookedModel, tokens: Int[Tensor, " pos"], *, patterns: bool = True) -> Reading:
    """Run a model on one text.

    Args:
        model: a hooked model; hooks that are kept on it take part.
        tokens: the text.
        patterns: whether to read attention patterns. Attention is then computed step by step, without fused kernels.
    """
    layers = range(int(model.cfg.n_layers))
    z: dict[int, Tensor] = {}
    seen: dict[int, Tensor] = {}

    def keep(kept: dict[int, Tensor], layer: int, values: Tensor) -> None:
        kept[layer] = values[0].float().cpu()

    def only_last(resid: Tensor, hook: Any) -> Tensor:
        return resid[:, -1:]

    hooks = [*z_readers(layers, lambda layer, values: keep(z, layer, values)), (before_unembed(model), only_last)]
    inside = readers(pattern_name, layers, lambda layer, values: keep(seen, layer, values))
    wanted = patterns and has_patterns(model)
    with torch.inference_mode(), kept_hooks(model, inside if wanted else []):
        logits = forward(model, tokens[None].to(device_of(model)), hooks)
    found = torch.stack([seen[layer] for layer in layers]) if len(seen) == len(layers) else None
    probabilities = torch.softmax(logits[0, -1].float(), -1).cpu()
    return Reading(torch.stack([z[layer] for layer in layers], dim=1), probabilities, found)


def in_pruned_order(pair: Pair, dense: Reading) -> Reading:
    """The dense model's reading with its heads in the order of the pruned model's."""
    if all(heads == tuple(range(dense.z.shape[2])) for heads in pair.head_map.dense_heads):
        return dense
    z = torch.stack([pair.kept_heads(layer, dense.z[:, layer]) for layer in range(pair.n_layers)], dim=1)
    if dense.patterns is None:
        return Reading(z, dense.probabilities, None)
    kept = [dense.patterns[layer, list(heads)] for layer, heads in enumerate(pair.head_map.dense_heads)]
    return Reading(z, dense.probabilities, torch.stack(kept))
