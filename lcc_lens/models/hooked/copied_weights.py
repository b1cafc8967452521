"""Copies of weights that hooked models compute with, by the checkpoint's names of the originals.

HookedTransformer copies output and down projections. TransformerBridge copies the rows of a joint layer, such as
``c_attn`` of GPT-2, into layers of queries, keys and values.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lcc_lens.core.errors import RequestError
from lcc_lens.models.architecture.anatomy import ATTENTION_OUTPUTS, MLP_OUTPUTS
from lcc_lens.models.architecture.layers import decoder_layers, is_linear, is_transposed, linear_weight
from lcc_lens.models.hooked.offloading import weight_in_memory

_Site = Literal["z", "mlp"]
#: By HookedTransformer and site, the checkpoint's names of the linear layers that read the site, by layer.
_COPIED: WeakKeyDictionary[Any, dict[_Site, tuple[str, ...]]] = WeakKeyDictionary()
#: By site: the usual names of the linear layer that reads it, and the module and attribute of HookedTransformer's copy.
_READERS: Mapping[_Site, tuple[tuple[str, ...], str, str]] = {
    "z": (ATTENTION_OUTPUTS, "attn", "W_O"),
    "mlp": (MLP_OUTPUTS, "mlp", "W_out"),
}
#: By part of a bridge's layer: its function that splits a joint layer, and its layers of the results, in their order.
_SPLITS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "attn": ("split_qkv_matrix", ("q", "k", "v")),
    "mlp": ("split_gate_up_matrix", ("gate", "in")),
}
#: By bridge: for each plain name of a joint layer, the places of its copies and the rows that they hold.
_SPLIT: WeakKeyDictionary[Any, dict[str, list[tuple[str, Tensor]]]] = WeakKeyDictionary()


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


def split_rows(model: Any, modules: Mapping[str, nn.Module]) -> dict[str, list[tuple[nn.Module, Int[Tensor, " row"]]]]:
    """By name of a joint layer, a bridge's layers that compute with copies of its rows, and these rows.

    Args:
        model: a bridge; ``modules``: the plain model's modules by name.
    """
    if model not in _SPLIT:
        _SPLIT[model] = {}
        for layer, block in enumerate(model.blocks):
            for part, (split, copies) in _SPLITS.items():
                if getattr(block._modules.get(part), split, None) is not None:
                    _find_rows(model, f"blocks.{layer}.{part}", split, copies, modules)
    return {
        name: [(model.get_submodule(path).original_component, rows) for path, rows in found]
        for name, found in _SPLIT[model].items()
    }


def _find_rows(model: Any, path: str, split: str, copies: tuple[str, ...], modules: Mapping[str, nn.Module]) -> None:
    """Find which rows of which layer the copies hold: split layers whose weights are the numbers of their rows."""
    bridge = model.get_submodule(path)
    inside = {id(module) for module in bridge.original_component.modules()}
    joint = {name: m for name, m in modules.items() if id(m) in inside and is_linear(m)}
    ends = list(accumulate(len(linear_weight(module)) for module in joint.values()))
    with _numbered(joint):
        parts = getattr(bridge, split)(bridge.original_component)
    for copy, part in zip(copies, parts, strict=False):
        rows = part.weight.detach()[:, 0].long()
        name = list(joint)[bisect_right(ends, int(rows[0]))]
        rows = rows - (ends[list(joint).index(name)] - len(linear_weight(joint[name])))
        own = bridge._modules[copy].original_component.weight
        if int(rows.min()) >= 0 and int(rows.max()) < len(linear_weight(joint[name])):
            if torch.equal(own, linear_weight(joint[name])[rows.to(own.device)]):
                _SPLIT[model].setdefault(name, []).append((f"{path}.{copy}", rows))


@contextmanager
def _numbered(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let every row of every layer hold its number, counted over all of them, inside the block."""
    first = 0
    try:
        for module in modules.values():
            weight = linear_weight(module)
            numbers = torch.arange(first, first + len(weight), dtype=torch.float32, device=weight.device)
            rows = numbers[:, None].expand(weight.shape)
            module.__dict__["weight"] = rows.T if is_transposed(module) else rows
            first += len(weight)
        yield
    finally:
        for module in modules.values():
            module.__dict__.pop("weight", None)


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
