"""What a restoration costs once it is merged: numbers that the checkpoint gains, zeros that it loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import tensor_names
from lcc_lens.models.architecture.joint_bias_slots import find_joint_slots
from lcc_lens.models.architecture.layers import is_transposed
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.sites import ConstantSite, reading_maps
from lcc_lens.models.pair import Pair
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.injections.weights import layer_maps


def merging_costs(injection: Injection, pair: Pair, model: HookedModel) -> dict[str, Any]:
    """What merging an injection into a pair's pruned (or dense) model costs.

    Returns:
        ``n_added``: numbers that the checkpoint holds beyond its own (None where no checkpoint of the architecture can
        hold the result): biases for constants, none for changed weights. Adapters stay beside the weights, since
        merged they fill the zeros. ``zeros_kept``: the share of zeros in the decoder layers' linear maps that are zeros
        after merging; 1 for all that acts under the zero pattern. None where there are no zeros.
    """
    footprint = injection.footprint
    added = _bias_numbers(pair, footprint.biases)
    return {
        "n_added": None if added is None else footprint.n_beside + added,
        "zeros_kept": _zeros_kept(model, injection.merged_weights()),
    }


def _bias_numbers(pair: Pair, sites: Sequence[ConstantSite]) -> int | None:
    """What biases for constants at some sites add to the checkpoint, with those that come along as zeros."""
    path = pair.pruned_id.path
    try:
        slots = find_joint_slots(path, {site: reading_maps(pair.pruned, site) for site in sites})
    except RequestError:
        return None
    return sum(math.prod(shape) for shape in slots.new_biases(tensor_names(path)).values())


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
