"""The plain modules under a hooked model, by the checkpoint's names, and weights changed for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from lcc_lens.errors import RequestError
from lcc_lens.hooks import HookedModel
from lcc_lens.offloading import require_in_memory
from lcc_lens.pruning.layers import is_transposed

#: By hooked model: where each plain module lies now, by its plain name. Paths, not modules: those would hold the model.
_PATHS: WeakKeyDictionary[Any, dict[str, str]] = WeakKeyDictionary()


def remember_plain_names(model: Any, names: Mapping[int, str]) -> None:
    """Note a bridge's modules by the names that they had before it wrapped them.

    Args:
        model: the hooked model.
        names: plain name by the module's ``id``.
    """
    original = model.original_model
    _PATHS[model] = {names[id(module)]: path for path, module in original.named_modules() if id(module) in names}


def plain_modules(model: HookedModel) -> dict[str, nn.Module]:
    """Every module of the plain model by its plain name, such as ``model.layers.0.mlp.down_proj``.

    Raises:
        RequestError: the model was not loaded here.
    """
    if model not in _PATHS:
        raise RequestError("wanted a model from load_pair or load_hooked, got one that was hooked elsewhere")
    original = cast("Any", model).original_model
    return {name: original.get_submodule(path) for name, path in _PATHS[model].items()}


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
        model: a hooked model.
        changes: by module name, what gives the new weight (same shape, format and device) for the old one; matrices
            are ``[out, in]`` whatever the module's layout.

    Raises:
        RequestError: no module of such a name.
    """
    modules = plain_modules(model)
    missing = [name for name in changes if name not in modules]
    if missing:
        raise RequestError(f"wanted a model with the module {missing[0]}, got one without; wrong model")
    if changes:
        require_in_memory(cast("Any", model).original_model, "changes of weights")
    held = {name: modules[name]._parameters["weight"] for name in changes}

    def refresh(*_: Any) -> None:
        for name, change in changes.items():
            weight = held[name]
            assert weight is not None
            is_turned = is_transposed(modules[name])
            modules[name].__dict__["weight"] = change(weight.T).T if is_turned else change(weight)

    handle = cast("Any", model).original_model.register_forward_pre_hook(refresh)
    for name in changes:
        del modules[name]._parameters["weight"]
        modules[name].__dict__["weight"] = held[name]  # until the first forward pass
    try:
        yield model
    finally:
        handle.remove()
        for name, weight in held.items():
            modules[name].__dict__.pop("weight", None)
            modules[name]._parameters["weight"] = weight
