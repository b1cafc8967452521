"""The plain modules under a hooked model, by the checkpoint's names, and weights changed for a while.

TransformerBridge computes with transformers' own modules. HookedTransformer computes with copies, of which the maps
that read a site (output and down projections) are known by the checkpoint's names here, and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

from jaxtyping import Float
from torch import Tensor, nn

from lcc_lens.core.errors import RequestError
from lcc_lens.models.architecture.layers import is_transposed
from lcc_lens.models.hooked.copied_weights import WeightLocation, copied_weights
from lcc_lens.models.hooked.hooked_transformer import is_hooked_transformer
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.offloading import require_in_memory

#: By hooked model: where each plain module lies now, by its plain name. Paths, not modules: those would hold the model.
_PATHS: WeakKeyDictionary[Any, dict[str, str]] = WeakKeyDictionary()


def remember_plain_names(model: Any, names: Mapping[int, str]) -> None:
    """Note a bridge's modules by the names that they had before it wrapped them.

    Args:
        names: plain name by the module's ``id``.
    """
    original = model.original_model
    _PATHS[model] = {names[id(module)]: path for path, module in original.named_modules() if id(module) in names}


def plain_modules(model: HookedModel) -> dict[str, nn.Module]:
    """Every module of the plain model by its plain name, such as ``model.layers.0.mlp.down_proj``."""
    if is_hooked_transformer(model):
        raise RequestError(
            "expected a hooked model that computes with the checkpoint's own modules, got a HookedTransformer, whose "
            "weights are copies; use constants and gains (lcc, offset, mean-shift, gain), or LCC_LENS_HOOKS=bridge"
        )
    if model not in _PATHS:
        raise RequestError("expected a model from load_pair or load_hooked, got one that was hooked elsewhere")
    original = cast("Any", model).original_model
    return {name: original.get_submodule(path) for name, path in _PATHS[model].items()}


def plain_model(model: HookedModel) -> Any:
    """The model of transformers whose modules carry the hooks: what it generates or scores is the hooked model's."""
    if is_hooked_transformer(model):
        raise RequestError(
            "expected a hooked model that transformers can generate and score tasks with, got a HookedTransformer; use "
            "LCC_LENS_HOOKS=bridge, or export the restoration and evaluate that"
        )
    return cast("Any", model).original_model


def changeable_weights(model: HookedModel) -> dict[str, WeightLocation]:
    """Where a hooked model's forward pass reads the weights that may be changed, by the checkpoint's module names.

    All modules with a weight of a TransformerBridge; of a HookedTransformer output and down projections alone.

    Raises:
        RequestError: the model was not loaded here.
    """
    if is_hooked_transformer(model):
        return copied_weights(model)
    modules = plain_modules(model).items()
    return {n: WeightLocation(m, "weight", is_transposed(m)) for n, m in modules if _has_weight(m)}


def _has_weight(module: nn.Module) -> bool:
    return isinstance(module._parameters.get("weight"), nn.Parameter)


def linear_weight(model: HookedModel, name: str) -> Float[Tensor, "out in"]:
    """The weight of a linear map by its plain name."""
    held = changeable_weights(model)[name]
    return held.matrix(held.value.detach())


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of a module's weight: ``[out, in]`` of a linear map whatever its layout, ``[d]`` of a norm."""
    weight = module.get_parameter("weight")
    return tuple(weight.shape[::-1] if is_transposed(module) else weight.shape)


@contextmanager
def changed_weights(model: HookedModel, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[HookedModel]:
    """Let plain modules compute with other weights inside the block; the model leaves it as it was.

    Every forward pass computes each changed weight once, from the weight that the module holds; gradients flow into
    whatever the change is made of.

    Args:
        changes: by module name, what gives the new weight (same shape, format and device) for the old one; matrices
            are ``[out, in]`` whatever the module's layout.
    """
    weights = changeable_weights(model)
    missing = [name for name in changes if name not in weights]
    if missing:
        raise RequestError(f"expected a model with the module {missing[0]}, got one without; wrong model")
    if changes and not is_hooked_transformer(model):
        require_in_memory(cast("Any", model).original_model, "changes of weights")
    held = {name: (weights[name], weights[name].weight) for name in changes}

    def refresh(*_: Any) -> None:
        for name, change in changes.items():
            place, old = held[name]
            place.owner.__dict__[place.attribute] = place.layout(change(place.matrix(old)), old)

    handle = _first_module(model).register_forward_pre_hook(refresh)
    for place, old in held.values():
        del place.owner._parameters[place.attribute]
        place.owner.__dict__[place.attribute] = old  # until the first forward pass
    try:
        yield model
    finally:
        handle.remove()
        for place, old in held.values():
            place.owner.__dict__.pop(place.attribute, None)
            place.owner._parameters[place.attribute] = cast("nn.Parameter", old)


def _first_module(model: Any) -> nn.Module:
    """What every forward pass calls first; HookedTransformer's hooked runs pass over its own ``__call__``."""
    first: nn.Module = model.embed if is_hooked_transformer(model) else model.original_model
    return first
