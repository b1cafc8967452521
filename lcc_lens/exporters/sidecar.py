"""Load a restored model without an export: a plain transformers model with constants beside its weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor, nn

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import RequestError
from lcc_lens.core.ranges import ranged
from lcc_lens.exporters.folding import fold, require_same_weights
from lcc_lens.models.architecture.anatomy import ATTENTION_OUTPUTS, MLP_OUTPUTS
from lcc_lens.models.architecture.layers import decoder_layers, is_transposed, linear_weight
from lcc_lens.models.hooked.sites import ConstantSite, projection_names
from lcc_lens.models.loading.hooked import load_hooked
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.loading.references import resolve
from lcc_lens.restoration.injections.changes import merged
from lcc_lens.restoration.injections.constants import SiteConstants
from lcc_lens.restoration.result import Restoration

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The buffer of a linear layer that holds the constant to add to its output; the model does not save it.
BUFFER = "restored_bias"
#: By site, the usual names in a layer of the projection that reads it.
_PROJECTIONS: Mapping[ConstantSite, tuple[str, ...]] = {"z": ATTENTION_OUTPUTS, "mlp": MLP_OUTPUTS}


@ranged
def load_restored(
    pruned: str | Path,
    restoration: Restoration | str | Path,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """Load a restored model with plain transformers: constants as buffers, changed weights in place.

    This works for every architecture, also those without a bias for the constants, which cannot be exported. In each
    layer a forward hook adds one vector to the output of the output projection or the down projection, in the model's
    own format; this takes no measurable time. A model with constants refuses to be saved, since they would be lost.

    Args:
        pruned: reference of the pruned model.
        restoration: the restoration of that model, or a run directory that holds it.
        device: see :func:`lcc_lens.core.config.default_device`.
        dtype: see :func:`lcc_lens.core.config.compute_dtype`.
        attention: transformers' attention implementation; its own choice for the architecture if not given.

    Raises:
        RequestError: the restoration belongs to other weights (by hash).

    Example:
        >>> model = load_restored("out/wanda50", "runs/restored")  # doctest: +SKIP
        >>> model.generate(**tokenizer("Hello", return_tensors="pt"))  # doctest: +SKIP
    """
    checkpoint = Checkpoint(resolve(pruned))
    if not isinstance(restoration, Restoration):
        restoration = Restoration.load(restoration)
    require_same_weights(restoration, checkpoint)
    model = load_plain(checkpoint.path, device=device, dtype=dtype, attention=attention)
    _change_weights(model, restoration)
    for site in restoration.constant_sites:  # after the changes, since constants pass through changed weights
        names = _usual_projections(model, site.site) or projection_names(load_hooked(pruned).model, site.site)
        _add_constants(model, site, names)
    if restoration.constant_sites:
        cast("Any", model).save_pretrained = _refuse_saving
    return model


def _change_weights(model: Any, restoration: Restoration) -> None:
    changes = merged({name: change} for name, change in restoration.changes)
    for name, change in changes.items():
        module = model.get_submodule(name)
        weight = module.weight
        with torch.no_grad():
            change = copy.deepcopy(cast("Any", change)).to(weight.device)  # the restoration's tensors stay in place
            old = weight.float()
            new = change(old.T).T if is_transposed(module) else change(old)
            weight.copy_(new)


def _usual_projections(model: Any, site: ConstantSite) -> tuple[str, ...]:
    """The projections that read a site, found by their usual names; empty if a layer has none of them."""
    where, layers = decoder_layers(model, model.config)
    names = []
    for number, layer in enumerate(layers):
        modules = dict(layer.named_modules())
        names += [f"{where}.{number}.{name}" for name in _PROJECTIONS[site] if name in modules][:1]
    return tuple(names) if len(names) == len(layers) else ()


def _add_constants(model: Any, site: SiteConstants, names: tuple[str, ...]) -> None:
    modules = {layer: model.get_submodule(names[layer]) for layer in sorted({part.layer for part in site.parts})}
    folded = fold(site.values, site.parts, {layer: linear_weight(module).cpu() for layer, module in modules.items()})
    for layer, module in modules.items():
        module.register_buffer(BUFFER, folded[layer].to(module.weight), persistent=False)
        module.register_forward_hook(_add_buffer)


def _add_buffer(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output + module.get_buffer(BUFFER)


def _refuse_saving(*_: Any, **__: Any) -> NoReturn:
    raise RequestError(
        "expected a model whose weights hold everything, got constants beside the weights, which would be lost; "
        "keep the pruned model and the restoration, or export"
    )
