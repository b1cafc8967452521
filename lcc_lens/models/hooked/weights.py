"""The weights of a hooked model by the checkpoint's names, and temporary changes of them.

TransformerBridge computes with transformers' own modules. HookedTransformer computes with copies; of these, only output
and down projections can be changed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lcc_lens.core.errors import RequestError
from lcc_lens.models.architecture.layers import is_transposed, linear_weight
from lcc_lens.models.hooked.copied_weights import WeightLocation, copied_weights, split_rows
from lcc_lens.models.hooked.hooked_transformer import is_hooked_transformer
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.offloading import require_in_memory

#: By hooked model: each plain module's path in it, by plain name. Modules would keep the model alive.
_PATHS: WeakKeyDictionary[Any, dict[str, str]] = WeakKeyDictionary()
#: By hooked model: how many blocks of :func:`changed_weights` it is in.
_CHANGED: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
#: By hooked model: how many hooks of its own it has, by hook point; TransformerLens wires OPT's MLPs by some.
_OWN_HOOKS: WeakKeyDictionary[Any, dict[str, int]] = WeakKeyDictionary()


def remember_plain_names(model: Any, names: Mapping[int, str]) -> None:
    """Record the names that a bridge's modules had before it wrapped them, given by the modules' ``id``."""
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
    """The model of transformers inside a bridge; its modules have the hooks, so it computes what the bridge does."""
    if is_hooked_transformer(model):
        raise RequestError(
            "expected a hooked model that transformers can generate and score tasks with, got a HookedTransformer; use "
            "LCC_LENS_HOOKS=bridge, or export the restoration and evaluate that"
        )
    return cast("Any", model).original_model


def changeable_weights(model: HookedModel) -> dict[str, WeightLocation]:
    """The weights of a hooked model that may be changed, by the checkpoint's module names.

    In a TransformerBridge all weights, in a HookedTransformer output and down projections.

    Raises:
        RequestError: the model was not loaded here.
    """
    if is_hooked_transformer(model):
        return copied_weights(model)
    return {
        name: WeightLocation(module, "weight", is_transposed(module))
        for name, module in plain_modules(model).items()
        if module._parameters.get("weight") is not None
    }


def split_layers(model: HookedModel) -> frozenset[str]:
    """The plain names of the joint layers, such as ``c_attn``, that a bridge computes by copies of their rows."""
    return frozenset() if is_hooked_transformer(model) else frozenset(split_rows(model, plain_modules(model)))


def named_weight(model: HookedModel, name: str) -> Float[Tensor, "out in"]:
    """The weight of a linear layer by its plain name."""
    location = changeable_weights(model)[name]
    return location.matrix(location.value.detach())


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of a module's weight: ``[out, in]`` of a linear layer whatever its layout, ``[d]`` of a norm."""
    return tuple(linear_weight(module).shape)


def remember_own_hooks(model: HookedModel) -> None:
    """Record the hooks with which a model computes what its checkpoint does."""
    _OWN_HOOKS[model] = _n_hooks(model)


def is_changed(model: HookedModel) -> bool:
    """Whether hooks are kept on a model or its weights are changed: it may compute otherwise than its checkpoint."""
    return _CHANGED.get(model, 0) > 0 or _n_hooks(model) != _OWN_HOOKS.get(model, {})


def _n_hooks(model: HookedModel) -> dict[str, int]:
    return {name: len(point.fwd_hooks) for name, point in model.hook_dict.items() if point.fwd_hooks}


@contextmanager
def changed_weights(model: HookedModel, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[HookedModel]:
    """Compute with changed weights inside the block; the model is unchanged after it.

    Every forward pass computes each changed weight once from the module's weight; gradients flow into the parameters of
    the change.

    Args:
        changes: by module name, a function from the old weight to the new one (same shape, format and device);
            matrices are ``[out, in]`` whatever the module's layout.
    """
    weights = changeable_weights(model)
    missing = [name for name in changes if name not in weights]
    if missing:
        raise RequestError(
            f"expected a model with the module {missing[0]}, got one without; name the model that was restored"
        )
    if changes and not is_hooked_transformer(model):
        require_in_memory(cast("Any", model).original_model, "changes of weights")
    changed = [(weights[name], weights[name].weight, change) for name, change in changes.items()]
    copies = {} if is_hooked_transformer(model) else split_rows(model, plain_modules(model))
    split = [copies.get(name, ()) for name in changes]

    def refresh(*_: Any) -> None:
        for (at, old, change), parts in zip(changed, split, strict=True):
            new = change(at.matrix(old))
            at.owner.__dict__[at.attribute] = at.layout(new, old)
            for part, rows in parts:
                part.__dict__["weight"] = new[rows.to(new.device)]

    bridge = cast("Any", model)  # a hooked run of HookedTransformer does not call the model itself, but its embedding
    first_module = bridge.embed if is_hooked_transformer(model) else bridge.original_model
    handle = first_module.register_forward_pre_hook(refresh)
    _CHANGED[model] = _CHANGED.get(model, 0) + 1
    try:
        with torch.no_grad():
            refresh()  # for what reads weights before the first forward pass
        for at, _, _ in changed:
            del at.owner._parameters[at.attribute]
        yield model
    finally:
        _CHANGED[model] -= 1
        handle.remove()
        for at, old, _ in changed:
            at.owner.__dict__.pop(at.attribute, None)
            at.owner._parameters[at.attribute] = cast("nn.Parameter", old)
        for part, _ in chain.from_iterable(split):
            part.__dict__.pop("weight", None)
