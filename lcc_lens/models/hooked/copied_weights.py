"""HookedTransformer's copies of output and down projections, by the checkpoint's names of the originals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lcc_lens.core.errors import RequestError
from lcc_lens.models.architecture.anatomy import ATTENTION_OUTPUTS, MLP_OUTPUTS
from lcc_lens.models.architecture.layers import decoder_layers, linear_weight
from lcc_lens.models.hooked.offloading import weight_in_memory

_Site = Literal["z", "mlp"]
#: By HookedTransformer and site, the checkpoint's names of the linear layers that read the site, by layer.
_COPIED: WeakKeyDictionary[Any, dict[_Site, tuple[str, ...]]] = WeakKeyDictionary()
#: By site: the usual names of the linear layer that reads it, and the module and attribute of HookedTransformer's copy.
_READERS: Mapping[_Site, tuple[tuple[str, ...], str, str]] = {
    "z": (ATTENTION_OUTPUTS, "attn", "W_O"),
    "mlp": (MLP_OUTPUTS, "mlp", "W_out"),
}


@dataclass(frozen=True)
class WeightLocation:
    """Where a hooked forward pass reads a weight: an attribute of a module, in that module's layout."""

    owner: nn.Module
    attribute: str
    is_transposed: bool
    """Whether the weight is stored as ``[in, out]``; HookedTransformer keeps heads apart: ``[head, d_head, out]``."""

    def matrix(self, stored: Tensor) -> Tensor:
        """A stored weight as ``[out, in]``."""
        return (stored.flatten(0, -2) if stored.ndim > 2 else stored).T if self.is_transposed else stored

    def layout(self, matrix: Tensor, like: Tensor) -> Tensor:
        """A weight ``[out, in]`` in the layout of the stored weight ``like``."""
        return (matrix.T if self.is_transposed else matrix).reshape(like.shape)

    @property
    def weight(self) -> Tensor:
        """The stored weight."""
        return self.owner.get_parameter(self.attribute)

    @property
    def value(self) -> Tensor:
        """The stored weight, read from the checkpoint if it is offloaded to disk."""
        return weight_in_memory(self.owner) if self.attribute == "weight" else self.weight

    @property
    def shape(self) -> tuple[int, ...]:
        """``[out, in]`` of a linear layer whatever its layout, ``[d]`` of a norm."""
        return tuple(self.matrix(self.weight.detach()).shape)


def remember_copied_projections(model: Any, plain: Any) -> None:
    """Record which modules of the plain model HookedTransformer's output and down projections are copies of."""
    prefix, layers = decoder_layers(plain, plain.config)
    copied: dict[_Site, tuple[str, ...]] = {}
    for site, (candidates, _, _) in _READERS.items():
        names = [_original_of(_copied_weight(model, site, i), layer, candidates) for i, layer in enumerate(layers)]
        if all(name is not None for name in names):
            copied[site] = tuple(f"{prefix}.{index}.{name}" for index, name in enumerate(names))
    if "z" not in copied:
        raise RequestError(
            f"expected an output projection in every layer, got an unknown layout of {plain.config.model_type}; use "
            "LCC_LENS_HOOKS=bridge"
        )
    _COPIED[model] = copied


def copied_projection_names(model: Any, site: _Site) -> tuple[str, ...]:
    """By layer, the checkpoint's names of the linear layers that read a site; empty if a layer has none."""
    if model not in _COPIED:
        raise RequestError(
            "expected a HookedTransformer from load_pair or load_hooked, got one that was not checked against its "
            "checkpoint; pass it to load_hooked first"
        )
    return _COPIED[model].get(site, ())


def copied_weights(model: Any) -> dict[str, WeightLocation]:
    """Where a HookedTransformer keeps its output and down projections, by the checkpoint's names."""
    return {
        name: _copied_weight(model, site, layer)
        for site in _READERS
        for layer, name in enumerate(copied_projection_names(model, site))
    }


def _copied_weight(model: Any, site: _Site, layer: int) -> WeightLocation:
    _, part, attribute = _READERS[site]
    return WeightLocation(model.blocks[layer].get_submodule(part), attribute, is_transposed=True)


def _original_of(copy: WeightLocation, layer: nn.Module, candidates: tuple[str, ...]) -> str | None:
    """The name of the linear layer within a decoder layer whose weight equals the copy."""
    if copy.owner._parameters.get(copy.attribute) is None:  # experts have weights of their own
        return None
    modules = dict(layer.named_modules())
    present = [name for name in candidates if name in modules]
    return next((n for n in present if torch.equal(copy.matrix(copy.weight), linear_weight(modules[n]))), None)
