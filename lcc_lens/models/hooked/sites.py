"""The linear maps that read a site: a constant added there is their bias, a gain there scales their columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lcc_lens.core.errors import RequestError
from lcc_lens.models.hooked.copied_weights import copied_projection_names
from lcc_lens.models.hooked.hooked_transformer import is_hooked_transformer
from lcc_lens.models.hooked.hooks import HookedModel, NamedHook, adders, mlp_name, readers, z_name
from lcc_lens.models.hooked.weights import plain_modules, weight_shape

#: Sites whose activation nothing but one linear map reads: head outputs, and the MLP's post-activation (one part per
#: layer, written as its head 0).
ConstantSite = Literal["z", "mlp"]
CONSTANT_SITES: tuple[ConstantSite, ...] = get_args(ConstantSite)
_NAMES: Mapping[ConstantSite, Callable[[int], str]] = {"z": z_name, "mlp": mlp_name}
#: Of the block, the attribute paths of the map in TransformerLens' words.
_MAPS: Mapping[ConstantSite, tuple[str, str]] = {"z": ("attn", "o"), "mlp": ("mlp", "out")}
_WORDS: Mapping[ConstantSite, str] = {
    "z": "an output projection",
    "mlp": "a down projection",
}


def projection_names(model: HookedModel, site: ConstantSite) -> tuple[str, ...]:
    """The plain names of the maps that read a site, by layer, such as ``model.layers.0.mlp.down_proj``."""
    if is_hooked_transformer(model):
        copied = copied_projection_names(model, site)
        if not copied:
            raise RequestError(f"expected {_WORDS[site]} in every layer, got none that is known; leave it out")
        return copied
    names = {id(module): name for name, module in plain_modules(model).items()}
    found = [names.get(id(_map_of(block, site))) for block in cast("Any", model).blocks]
    missing = [layer for layer, name in enumerate(found) if name is None]
    if missing:
        raise RequestError(f"expected {_WORDS[site]} in every layer, got none in layer {missing[0]}; leave it out")
    return tuple(name for name in found if name is not None)


def mlp_width(model: HookedModel) -> int:
    """The width of the MLP's post-activation: the down projection's inputs; 0 where a model has neither."""
    blocks = getattr(model, "blocks", None)
    module = _map_of(blocks[0], "mlp") if blocks else None
    # TransformerLens writes four times d_model into d_mlp of some architectures, whatever they have
    return weight_shape(module)[1] if module is not None else int(model.cfg.d_mlp or 0)


def site_adders(site: ConstantSite, constants: Mapping[int, Float[Tensor, "part width"]]) -> list[NamedHook]:
    """Hooks that add constants at a site, by layer; zero rows leave their part alone."""
    return adders(_NAMES[site], constants if site == "z" else {layer: c[0] for layer, c in constants.items()})


def site_readers(site: ConstantSite, layers: Iterable[int], visit: Callable[[int, Tensor], None]) -> list[NamedHook]:
    """Hooks that hand the activation at a site to ``visit(layer, activation)`` and change nothing."""
    return readers(_NAMES[site], layers, visit)


def projection_output_name(site: ConstantSite) -> Callable[[int], str]:
    """Gives, by layer, the hook point of what a site's map puts out, ``[batch, pos, d_model]``."""
    inner, outer = _MAPS[site]
    return lambda layer: f"blocks.{layer}.{inner}.{outer}.hook_out"


def _map_of(block: Any, site: ConstantSite) -> nn.Module | None:
    """The plain module in a block that reads a site."""
    inner, outer = _MAPS[site]
    bridge = getattr(getattr(block, inner, None), outer, None)
    module = getattr(bridge, "original_component", None)
    has_matrix = isinstance(module, nn.Module) and isinstance(getattr(module, "weight", None), torch.Tensor)
    return module if has_matrix else None
