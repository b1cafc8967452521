"""What a restoration costs once it is merged: numbers that the checkpoint gains, zeros that it loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lcc_lens.baselines import AdapterInjection
from lcc_lens.errors import RequestError
from lcc_lens.export import find_slots
from lcc_lens.files import tensor_names
from lcc_lens.hooks import HookedModel
from lcc_lens.injections import Injection, LccInjection
from lcc_lens.injections.changes import merged
from lcc_lens.injections.weights import layer_maps
from lcc_lens.pair import Pair
from lcc_lens.pruning.layers import is_transposed


def merging_costs(injection: Injection, pair: Pair, model: HookedModel) -> dict[str, Any]:
    """What merging an injection into a pair's pruned (or dense) model costs.

    Returns:
        ``n_added``: numbers that the checkpoint holds beyond its own (None where no checkpoint of the architecture can
        hold the result): biases for constants, none for changed weights. Adapters stay beside the weights, since
        merged they fill the zeros. ``zeros_kept``: the share of zeros in the decoder layers' linear maps that are zeros
        after merging; 1 for all that acts under the zero pattern. None where there are no zeros.
    """
    if isinstance(injection, AdapterInjection):
        return {"n_added": injection.n_beside, "zeros_kept": _zeros_kept(model, injection.merged_weights())}
    changes = merged(part.changes() for part in injection.parts)
    has_constants = any(isinstance(part, LccInjection) for part in injection.parts)
    return {"n_added": _bias_numbers(pair) if has_constants else 0, "zeros_kept": _zeros_kept(model, changes)}


def _bias_numbers(pair: Pair) -> int | None:
    """What biases at the attention's outputs add to the checkpoint, with those that come along as zeros."""
    path = pair.pruned_id.path
    try:
        slots = find_slots(path, pair.output_projections)
    except RequestError:
        return None
    stored = tensor_names(path)
    new = sum(slots.width or 0 for bias in slots.biases if bias not in stored)
    return new + sum(math.prod(shape) for shape in slots.zero_biases.values())


@torch.no_grad()
def _zeros_kept(model: HookedModel, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> float | None:
    zeros = kept = 0
    for name, module in layer_maps(model).items():
        weight: Tensor = module.get_parameter("weight")
        weight = weight.T if is_transposed(module) else weight
        were = weight == 0
        zeros += int(were.sum())
        kept += int((were & (changes[name](weight) == 0)).sum()) if name in changes else int(were.sum())
    return kept / zeros if zeros else None
