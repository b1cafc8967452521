"""The linear layers that read a site: a constant added there is their bias, and a gain there scales their columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lcc_lens.core.errors import RequestError
from lcc_lens.models.hooked.copied_weights import copied_projection_names
from lcc_lens.models.hooked.hooked_transformer import is_hooked_transformer
from lcc_lens.models.hooked.hooks import HookedModel, NamedHook, adders, mlp_name, readers, z_name
from lcc_lens.models.hooked.self_checks import check_tokens, run_with_activations, tried_once
from lcc_lens.models.hooked.weights import plain_modules, weight_shape

#: Sites whose activation is read by one linear layer alone: head outputs (output projection), and the MLP's
#: post-activation (down projection; one part per layer, written as its head 0).
ConstantSite = Literal["z", "mlp"]
CONSTANT_SITES: tuple[ConstantSite, ...] = get_args(ConstantSite)
_NAMES: Mapping[ConstantSite, Callable[[int], str]] = {"z": z_name, "mlp": mlp_name}
#: The linear layer's place in a block, in TransformerLens' names.
_PATHS: Mapping[ConstantSite, tuple[str, str]] = {"z": ("attn", "o"), "mlp": ("mlp", "out")}
_WORDS: Mapping[ConstantSite, str] = {"z": "an output projection", "mlp": "a down projection"}


def projection_names(model: HookedModel, site: ConstantSite) -> tuple[str, ...]:
    """By layer, the plain name of the linear layer that reads a site, such as ``model.layers.0.mlp.down_proj``."""
    if is_hooked_transformer(model):
        copied = copied_projection_names(model, site)
        if not copied:
            raise RequestError(f"expected {_WORDS[site]} in every layer, got none that is known; leave it out")
        return copied
    names = {id(module): name for name, module in plain_modules(model).items()}
    projections: list[str] = []
    for layer, block in enumerate(cast("Any", model).blocks):
        name = names.get(id(_reader(block, site)))
        if name is None:
            raise RequestError(f"expected {_WORDS[site]} in every layer, got none in layer {layer}; leave it out")
        projections.append(name)
    return tuple(projections)


def mlp_width(model: HookedModel) -> int:
    """The width of the MLP's post-activation, which the down projection reads; 0 if there is none."""
    blocks = getattr(model, "blocks", None)
    module = _reader(blocks[0], "mlp") if blocks else None
    # for some architectures TransformerLens sets cfg.d_mlp to four times d_model, whatever the weights
    return weight_shape(module)[1] if module is not None else int(model.cfg.d_mlp or 0)


@tried_once(on_failure=False)
def has_mlp_site(model: HookedModel) -> bool:
    """Whether the MLP's hook point holds the inputs of one down projection in every layer; mixtures have several."""
    bridge = cast("Any", model)
    if is_hooked_transformer(model):
        return bool(bridge.cfg.d_mlp) and not bridge.cfg.num_experts
    modules = [_reader(block, "mlp") for block in bridge.blocks]
    inputs: dict[int, Tensor] = {}

    def keeper(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: inputs.__setitem__(layer, args[0].detach().clone())

    names = [mlp_name(layer) for layer in range(len(modules))]
    with ExitStack() as stack:
        for layer, module in enumerate(modules):
            if module is None:
                return False
            stack.callback(module.register_forward_pre_hook(keeper(layer)).remove)
        _, seen = run_with_activations(model, check_tokens(model), names)
    return all(torch.equal(seen[name], inputs[layer].reshape(seen[name].shape)) for layer, name in enumerate(names))


def site_adders(site: ConstantSite, constants: Mapping[int, Float[Tensor, "part width"]]) -> list[NamedHook]:
    """Hooks that add constants at a site, by layer."""
    return adders(_NAMES[site], constants if site == "z" else {layer: c[0] for layer, c in constants.items()})


def site_readers(site: ConstantSite, layers: Iterable[int], visit: Callable[[int, Tensor], None]) -> list[NamedHook]:
    """Hooks that call ``visit(layer, activation)`` with the activation at a site."""
    return readers(_NAMES[site], layers, visit)


def projection_output_name(site: ConstantSite) -> Callable[[int], str]:
    """By layer, the hook point of the output of the linear layer that reads a site, ``[batch, pos, d_model]``."""
    inner, outer = _PATHS[site]
    return lambda layer: f"blocks.{layer}.{inner}.{outer}.hook_out"


def _reader(block: Any, site: ConstantSite) -> nn.Module | None:
    """The plain linear layer in a block that reads a site."""
    inner, outer = _PATHS[site]
    bridge = getattr(getattr(block, inner, None), outer, None)
    module = getattr(bridge, "original_component", None)
    has_matrix = isinstance(module, nn.Module) and isinstance(getattr(module, "weight", None), torch.Tensor)
    return module if has_matrix else None
