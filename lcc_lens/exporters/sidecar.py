"""Sidecars: a pruned model of plain transformers with a restoration beside its weights, for what no export can hold."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import RequestError
from lcc_lens.exporters.folding import fold, require_same_weights
from lcc_lens.models.architecture.anatomy import ATTENTION_OUTPUTS, MLP_OUTPUTS
from lcc_lens.models.architecture.layers import decoder_layers, is_transposed
from lcc_lens.models.hooked.sites import ConstantSite, projection_names
from lcc_lens.models.loading.hooked import load_hooked
from lcc_lens.models.loading.plain import load_plain
from lcc_lens.models.loading.references import resolve
from lcc_lens.restoration.injections.changes import merged
from lcc_lens.restoration.injections.constants import SiteConstants
from lcc_lens.restoration.result import Restoration

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The buffer that holds the constant after a map; it is not part of what the model saves.
BUFFER = "restored_bias"
#: By site, the usual names in a layer of the map that reads it.
_READERS: Mapping[ConstantSite, tuple[str, ...]] = {"z": ATTENTION_OUTPUTS, "mlp": MLP_OUTPUTS}


def load_restored(
    pruned: str | Path,
    restoration: Restoration | str | Path,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """A restored model of plain transformers without an export: constants as buffers, changed weights in place.

    For architectures that have no bias for the constants; it works for every one. The constants of a layer are one
    vector per site that a forward hook adds to the output of the map which reads the site (output projection, down
    projection), in the model's own format; what is added costs no measurable time. A model with constants refuses to be
    saved, since they would be lost.

    Args:
        pruned: reference of the pruned model.
        restoration: its restoration, or a run directory with one.
        device: see :func:`lcc_lens.core.config.default_device`.
        dtype: see :func:`lcc_lens.core.config.compute_dtype`.
        attention: transformers' attention implementation; its own choice for the architecture if not given.

    Raises:
        RequestError: other weights than the restoration's (by hash).

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
    for found in restoration.constant_sites:  # after the changes, through which constants pass
        names = _usual_readers(model, found.site) or projection_names(load_hooked(pruned).model, found.site)
        _add_constants(model, found, names)
    if restoration.constant_sites:
        cast("Any", model).save_pretrained = _refuse_saving
    return model


def _change_weights(model: Any, restoration: Restoration) -> None:
    changes = merged({name: change} for name, change in restoration.changes)
    for name, change in changes.items():
        module = model.get_submodule(name)
        weight = module.weight
        with torch.no_grad():
            change = copy.deepcopy(cast("Any", change)).to(weight.device)  # the restoration's own stay where they are
            old = weight.float()
            new = change(old.T).T if is_transposed(module) else change(old)
            weight.copy_(new)


def _usual_readers(model: Any, site: ConstantSite) -> tuple[str, ...]:
    """The maps that read a site by their usual names; nothing where a layer has none."""
    where, layers = decoder_layers(model, model.config)
    found = []
    for number, layer in enumerate(layers):
        modules = dict(layer.named_modules())
        found += [f"{where}.{number}.{name}" for name in _READERS[site] if name in modules][:1]
    return tuple(found) if len(found) == len(layers) else ()


def _add_constants(model: Any, found: SiteConstants, names: tuple[str, ...]) -> None:
    modules = {layer: model.get_submodule(names[layer]) for layer in sorted({part.layer for part in found.parts})}
    folded = fold(found.values, found.parts, {k: _weight(m).cpu() for k, m in modules.items()})
    for layer, module in modules.items():
        module.register_buffer(BUFFER, folded[layer].to(module.weight), persistent=False)
        module.register_forward_hook(_add_buffer)


def _add_buffer(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output + module.get_buffer(BUFFER)


def _weight(module: nn.Module) -> Float[Tensor, "d_model width"]:
    weight = module.get_parameter("weight")
    return weight.T if is_transposed(module) else weight


def _refuse_saving(*_: Any, **__: Any) -> NoReturn:
    raise RequestError(
        "expected a model whose files hold everything, got one with constants beside its weights; keep the "
        "pruned model "
        "and the restoration, or export"
    )
