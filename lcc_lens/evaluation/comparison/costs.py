"""Costs of a result: inference time with biases or adapters, added parameters, and zeros that merging fills."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import RequestError
from lcc_lens.evaluation.comparison.entry import Entry
from lcc_lens.evaluation.efficiency.timing import SpeedConfig, median_interval, median_ratio, time_models
from lcc_lens.models.architecture.joint_bias_slots import find_joint_slots
from lcc_lens.models.architecture.layers import is_linear, linear_weight
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.sites import ConstantSite, projection_names
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.pair import Pair
from lcc_lens.restoration.injections.adapters import ADAPTERS, adapted, targeted
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.injections.weights import IN_LAYER, layer_maps

#: A result that has the pruned model's form: at most its weights are changed.
PLAIN = "pruned"
#: EoRA's result has LoRA's form, beside every linear layer.
EVERY_LAYER = "eora"
#: Names of results with added biases, by the sites whose projections get them.
BIASES: dict[tuple[ConstantSite, ...], str] = {("z",): "biases", ("mlp",): "mlp biases", ("z", "mlp"): "all biases"}


def served_as(entry: Entry) -> str:
    """How a merged entry is served: like the ``pruned`` model (changed weights), with biases, or with an adapter."""
    if entry.method in ADAPTERS or entry.method == EVERY_LAYER:
        return entry.method
    return BIASES.get(entry.bias_sites, PLAIN)


def inference_costs(
    path: Path,
    projections: Mapping[ConstantSite, tuple[str, ...]],
    kinds: Collection[str],
    *,
    rank: int = 8,
    config: SpeedConfig | None = None,
) -> dict[str, dict[str, Any]]:
    """Time plain models in interleaved rounds. Times depend on shapes, not values, so added parameters are zeros.

    Args:
        projections: by site, the plain names of the linear layers that read it, by layer; not all sites have them.
        kinds: results of :func:`served_as`; ``pruned`` is always timed.

    Returns:
        By kind ``prefill_ms`` and ``decode_ms`` (per token), and ``prefill_ratio`` and ``decode_ratio`` to the pruned
        model's of the same round, each a median with its interval. Kinds that the architecture does not allow are left
        out.
    """
    config = config or SpeedConfig()
    models: dict[str, nn.Module] = {}
    for kind in dict.fromkeys([PLAIN, *kinds]):
        try:
            models[kind] = _served(path, projections, kind, rank)
        except RequestError:
            continue
    embedding = cast("Any", models[PLAIN]).get_input_embeddings()
    durations = time_models(models, config, embedding.weight.shape[0], embedding.weight.device)
    costs: dict[str, dict[str, Any]] = {kind: {} for kind in models}
    for phase, by_kind in durations.items():
        for kind, values in by_kind.items():
            costs[kind][f"{phase}_ms"] = median_interval(values)
            costs[kind][f"{phase}_ratio"] = median_ratio(values, by_kind[PLAIN])
    return costs


def _served(path: Path, projections: Mapping[ConstantSite, tuple[str, ...]], kind: str, rank: int) -> Any:
    sites = next((sites for sites, name in BIASES.items() if name == kind), ())
    if not set(sites) <= projections.keys():
        raise RequestError(f"expected linear layers that read {' and '.join(sites)}, got none; leave {kind} out")
    checkpoint = Checkpoint(path)
    slots = find_joint_slots(checkpoint, {site: projections[site] for site in sites})
    model = load_plain(path)
    modules = dict(model.named_modules())
    for name, shape in slots.new_biases(checkpoint.tensors).items():
        module: Any = modules.get(name.removesuffix(".bias"))  # None where the export would split a fused layer
        if module is not None:
            module.bias = nn.Parameter(torch.zeros(shape).to(module.weight), requires_grad=False)
    if kind in ADAPTERS or kind == EVERY_LAYER:
        adapter, targets = ADAPTERS.get(kind, ("lora", "all"))
        linear = [name for name, m in model.named_modules() if is_linear(m) and IN_LAYER.search(name)]
        adapted(model, targeted(linear, targets, projections["z"]), kind=adapter, rank=rank, seed=0)
        for layer in model.modules():  # in the model's number format
            for name, parameter in layer.named_parameters(recurse=False):
                if parameter.dtype != model.dtype:
                    setattr(layer, name, nn.Parameter(parameter.data.to(model.dtype), requires_grad=False))
    return model


def merging_costs(injection: Injection, pair: Pair, model: HookedModel) -> dict[str, Any]:
    """Parameters that an injection adds to the checkpoint, and zeros that survive merging it.

    Returns:
        ``n_added``: parameters that the checkpoint gains: biases for constants, an adapter's own (merged it would fill
        the zeros), none for changed weights; None if no checkpoint of the architecture can hold the result.
        ``zeros_kept``: fraction of the zeros in the decoder layers' linear weights that are zeros after merging, 1 for
        all that keeps the zero pattern; None without zeros.
    """
    footprint = injection.footprint
    added = _n_biases(pair, footprint.biases)
    return {
        "n_added": None if added is None else footprint.n_beside + added,
        "zeros_kept": _zeros_kept(model, injection.merged_weights()),
    }


def _n_biases(pair: Pair, sites: Sequence[ConstantSite]) -> int | None:
    """Parameters of the biases that constants at some sites need, with the zero biases that they entail."""
    checkpoint = pair.pruned_id.checkpoint
    try:
        slots = find_joint_slots(checkpoint, {site: projection_names(pair.pruned, site) for site in sites})
    except RequestError:
        return None
    return sum(math.prod(shape) for shape in slots.new_biases(checkpoint.tensors).values())


@torch.no_grad()
def _zeros_kept(model: HookedModel, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> float | None:
    n_zeros = n_kept = 0
    for name, module in layer_maps(model).items():
        weight = linear_weight(module)
        is_zero = weight == 0
        n_zeros += int(is_zero.sum())
        after = changes[name](weight) if name in changes else weight
        n_kept += int((is_zero & (after == 0)).sum())
    return n_kept / n_zeros if n_zeros else None
