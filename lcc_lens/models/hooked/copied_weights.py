"""The maps of HookedTransformer that read a site, which are copies, by the names that their originals have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lcc_lens.core.errors import RequestError
from lcc_lens.models.architecture.anatomy import ATTENTION_OUTPUTS, MLP_OUTPUTS
from lcc_lens.models.architecture.layers import decoder_layers, is_transposed
from lcc_lens.models.hooked.offloading import weight_in_memory

_Site = Literal["z", "mlp"]
#: By HookedTransformer and site, the plain names of the maps that read it, by layer.
_COPIED: WeakKeyDictionary[Any, dict[_Site, tuple[str, ...]]] = WeakKeyDictionary()
#: By site: the usual names in a layer of the map that reads it, and where HookedTransformer holds its weight.
_READERS: Mapping[_Site, tuple[tuple[str, ...], str, str]] = {
    "z": (ATTENTION_OUTPUTS, "attn", "W_O"),
    "mlp": (MLP_OUTPUTS, "mlp", "W_out"),
}


@dataclass(frozen=True)
class WeightLocation:
    """A weight where a hooked forward pass reads it: an attribute of a module, in that module's layout."""

    owner: nn.Module
    attribute: str
    is_turned: bool
    """Whether it is held as ``[in, out]``; HookedTransformer keeps heads apart: ``[head, d_head, out]``."""

    def matrix(self, held: Tensor) -> Tensor:
        """The held tensor as a linear map's weight, ``[out, in]``."""
        return (held.flatten(0, -2) if held.ndim > 2 else held).T if self.is_turned else held

    def layout(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The way back: a weight ``[out, in]`` as it is held."""
        turned = matrix.T if self.is_turned else matrix
        return turned if turned.shape == like.shape else turned.reshape(like.shape)

    @property
    def weight(self) -> Tensor:
        """The held tensor."""
        return self.owner.get_parameter(self.attribute)

    @property
    def value(self) -> Tensor:
        """The held tensor, read from the checkpoint where it lies on disk."""
        return weight_in_memory(self.owner) if self.attribute == "weight" else self.weight

    @property
    def shape(self) -> tuple[int, ...]:
        """``[out, in]`` of a linear map whatever its layout, ``[d]`` of a norm."""
        return tuple(self.matrix(self.weight.detach()).shape)


def remember_copied_projections(model: Any, plain: Any) -> None:
    """Note which modules of the plain model HookedTransformer's output and down projections are copies of.

    Args:
        plain: the model of transformers that it was made from.
    """
    where, layers = decoder_layers(plain, plain.config)
    found: dict[_Site, tuple[str, ...]] = {}
    for site, (names, _, _) in _READERS.items():
        own = [_copy_of(_copied_weight(model, site, i), layer, names) for i, layer in enumerate(layers)]
        if all(name is not None for name in own):
            found[site] = tuple(f"{where}.{index}.{name}" for index, name in enumerate(own))
    if "z" not in found:
        raise RequestError(
            f"expected an output projection in every layer, got none that is known in {plain.config.model_type}; use "
            "LCC_LENS_HOOKS=bridge"
        )
    _COPIED[model] = found


def copied_projection_names(model: Any, site: _Site) -> tuple[str, ...]:
    """The plain names of the maps that read a site of a HookedTransformer, by layer; none where a layer has none."""
    if model not in _COPIED:
        raise RequestError(
            "expected a HookedTransformer from load_pair or load_hooked, got one that was not checked against its "
            "checkpoint; hand it to load_hooked first"
        )
    return _COPIED[model].get(site, ())


def copied_weights(model: Any) -> dict[str, WeightLocation]:
    """Where the forward pass of a HookedTransformer reads those maps' weights, by plain name.

    Raises:
        RequestError: the model was not loaded here.
    """
    return {
        name: _copied_weight(model, site, layer)
        for site in _READERS
        for layer, name in enumerate(copied_projection_names(model, site))
    }


def _copied_weight(model: Any, site: _Site, layer: int) -> WeightLocation:
    _, part, attribute = _READERS[site]
    owner: nn.Module = model.blocks[layer].get_submodule(part)
    return WeightLocation(owner, attribute, is_turned=True)


def _copy_of(held: WeightLocation, layer: nn.Module, names: tuple[str, ...]) -> str | None:
    """The name in a layer of the map that a weight is a copy of."""
    modules = dict(layer.named_modules())
    if held.owner._parameters.get(held.attribute) is None:  # experts have weights of their own
        return None
    for name in names:
        if name in modules:
            weight = modules[name].get_parameter("weight")
            matrix = weight.T if is_transposed(modules[name]) else weight
            if torch.equal(held.matrix(held.weight), matrix):
                return name
    return None
