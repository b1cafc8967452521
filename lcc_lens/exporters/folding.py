"""Fold a restoration into a checkpoint: constants become biases, and weight changes become new weights."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.models.architecture.bias_slots import BiasSlots
from lcc_lens.models.architecture.joint_bias_slots import JointSlots
from lcc_lens.models.hooked.sites import projection_names
from lcc_lens.models.loading.hooked import LoadedModel
from lcc_lens.restoration.injections.changes import merged
from lcc_lens.restoration.injections.constants import SiteConstants
from lcc_lens.restoration.result import Restoration


def require_same_weights(restoration: Restoration, pruned: Checkpoint) -> None:
    """Refuse a model other than the one that was restored."""
    expected = restoration.record.pruned_sha256
    if expected != pruned.sha256:
        raise RequestError(
            f"expected the pruned model with SHA-256 {expected[:12]}…, got {pruned.sha256[:12]}… in {pruned.path}; "
            "name the model that was restored"
        )


def fold(
    constants: Float[Tensor, "chosen d_head"],
    heads: tuple[Any, ...],
    weights: Mapping[int, Float[Tensor, "d_model zwidth"]],
) -> dict[int, Float[Tensor, " d_model"]]:
    r"""The bias that replaces constants at ``hook_z``: $b_O \mathrel{+}= \sum_h W_O^{(h)} c_h$ per layer, in float64.

    Constants at an MLP, as head 0 of its layer, become the down projection's bias the same way.

    Args:
        weights: by layer the output projection as ``nn.Linear`` stores it; head h owns columns h*d_head on.
    """
    d_head = constants.shape[-1]
    biases = {layer: torch.zeros(weight.shape[0], dtype=torch.float64) for layer, weight in weights.items()}
    for (layer, head), constant in zip(heads, constants.double(), strict=True):
        columns = weights[layer][:, head * d_head : (head + 1) * d_head]
        biases[layer] += columns.double() @ constant
    return biases


def fold_values(
    constants: Float[Tensor, "chosen d_head"], heads: tuple[Any, ...], n_heads: int, heads_per_bias: int = 1
) -> dict[int, Float[Tensor, " kvwidth"]]:
    r"""The biases of the value projections that replace constants at ``hook_z``, in float64.

    A query's attention weights sum to one, so $\sum_j a_j (v_j + b) = z + b$: the bias is the constant itself.

    Args:
        heads_per_bias: query heads that share a value head.
    """
    d_head = constants.shape[-1]
    by_head = {layer: torch.zeros(n_heads, d_head, dtype=torch.float64) for layer, _ in heads}
    for (layer, head), constant in zip(heads, constants.double(), strict=True):
        by_head[layer][head] = constant
    grouped = {layer: values.unflatten(0, (-1, heads_per_bias)) for layer, values in by_head.items()}
    for layer, groups in grouped.items():
        if not torch.equal(groups, groups[:, :1].expand_as(groups)):
            raise RequestError(
                f"expected the same constant in all heads that share a value head, got others in layer {layer}; "
                "serve it with lcc_lens.load_restored"
            )
    return {layer: groups[:, 0].flatten() for layer, groups in grouped.items()}


def shares_values(restoration: Restoration, n_heads: int, heads_per_bias: int) -> bool:
    """Whether all heads that share a value head have the same constant."""
    try:
        fold_values(restoration.constants, restoration.heads, n_heads, heads_per_bias)
    except RequestError:
        return False
    return True


def edited_tensors(
    restoration: Restoration, checkpoint: Checkpoint, slots: JointSlots, loaded: LoadedModel
) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
    """The tensors to replace (changed weights, existing biases) and to add (biases that the new settings bring).

    Raises:
        RequestError: heads that share a value bias have different constants.
    """
    weights = _Weights(restoration, checkpoint, is_transposed=loaded.is_transposed)
    gains: dict[str, Tensor] = {}
    for site in restoration.constant_sites:
        site_slots = slots.by_site[site.site]
        for layer, gain in _folded(site, site_slots, loaded, weights).items():
            bias = site_slots.biases[layer]  # both sites' where the blocks of a layer are parallel
            gains[bias] = gains[bias] + gain if bias in gains else gain
    replaced: dict[str, Tensor] = {}
    for bias in gains.keys() & checkpoint.tensors.keys():
        old = checkpoint.read(bias)
        replaced[bias] = (old.double() + gains[bias]).to(old.dtype)
    dtype = checkpoint.read(checkpoint.stored_name(f"{loaded.output_projections[0]}.weight")).dtype
    new_biases = slots.new_biases(checkpoint.tensors)
    added = {name: gains.get(name, torch.zeros(shape)).to(dtype) for name, shape in new_biases.items()}
    return ChainMap(replaced, cast("dict[str, Tensor]", weights)), added


def _folded(site: SiteConstants, slots: BiasSlots, loaded: LoadedModel, weights: _Weights) -> dict[int, Tensor]:
    """What a site's constants add to the bias of each layer."""
    if slots.place == "value":
        return fold_values(site.values, site.parts, int(loaded.model.cfg.n_heads), slots.heads_per_bias)
    projections = projection_names(loaded.model, site.site)
    layers = sorted({part.layer for part in site.parts})
    return fold(site.values, site.parts, {layer: weights.of_module(projections[layer]) for layer in layers})


class _Weights(Mapping[str, Tensor]):
    """The changed weights by stored name, in the stored layout and format; one at a time is in memory.

    Raises, when a weight is looked up:
        LensError: a zero of a matrix was lost, or a weight is not finite.
    """

    def __init__(self, restoration: Restoration, checkpoint: Checkpoint, *, is_transposed: bool) -> None:
        changes = merged({name: change} for name, change in restoration.changes)
        self._changes = {checkpoint.stored_name(f"{module}.weight"): change for module, change in changes.items()}
        self._checkpoint, self._is_transposed = checkpoint, is_transposed

    def __getitem__(self, name: str) -> Tensor:
        change, old = self._changes[name], self._checkpoint.read(name)
        is_transposed = self._is_transposed and old.ndim > 1
        with torch.no_grad():
            new = change(old.float().T).T if is_transposed else change(old.float())
        new = new.to(old.dtype).contiguous()
        if not bool(torch.isfinite(new).all()):
            raise LensError(f"expected finite weights, got NaN or infinity in {name}; lower the learning rate")
        if old.ndim == 1:
            return new
        if bool(new[old == 0].any()):
            raise LensError(f"expected the zeros of {name} kept, got others; nothing was kept")
        return torch.where(old == 0, old, new)  # minus zero stays what it was, too

    def __iter__(self) -> Iterator[str]:
        return iter(self._changes)

    def __len__(self) -> int:
        return len(self._changes)

    def of_module(self, module: str) -> Float[Tensor, "d_model width"]:
        """An output or down projection, changed where the restoration changes it: constants pass through it."""
        name = self._checkpoint.stored_name(f"{module}.weight")
        weight = self[name] if name in self._changes else self._checkpoint.read(name)
        return weight.T if self._is_transposed else weight
