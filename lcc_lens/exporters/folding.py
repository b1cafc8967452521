"""Folding: a restoration as new values of a checkpoint's tensors."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import read_tensor, stored_name, tensor_names
from lcc_lens.models.architecture.bias_slots import BiasSlots
from lcc_lens.models.architecture.joint_bias_slots import JointSlots
from lcc_lens.models.hooked.sites import projection_names
from lcc_lens.models.loading.hooked import LoadedModel, ModelIdentity
from lcc_lens.restoration.injections.changes import merged
from lcc_lens.restoration.injections.constants import SiteConstants
from lcc_lens.restoration.result import Restoration


def require_same_weights(restoration: Restoration, identity: ModelIdentity) -> None:
    """Refuse a model other than the one that a restoration was found for.

    Raises:
        RequestError: the hashes differ.
    """
    wanted, got = restoration.record.pruned_sha256, identity.sha256
    if wanted != got:
        raise RequestError(
            f"expected the pruned model with SHA-256 {wanted[:12]}…, got {got[:12]}… in {identity.path}; name "
            f"the model "
            "that was restored"
        )


def fold(
    constants: Float[Tensor, "chosen d_head"],
    heads: tuple[Any, ...],
    weights: Mapping[int, Float[Tensor, "d_model zwidth"]],
) -> dict[int, Float[Tensor, " d_model"]]:
    r"""The bias that replaces constants at ``hook_z``: $b_O \mathrel{+}= \sum_h W_O^{(h)} c_h$ per layer, in float64.

    Constants at an MLP, as head 0 of its layer, become the down projection's bias the same way.

    Args:
        constants: the learned components.
        heads: their heads.
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
        constants: the learned components.
        heads: their heads.
        n_heads: query heads per layer.
        heads_per_bias: query heads that share a value head.

    Raises:
        RequestError: heads that share a value head have different constants.
    """
    d_head = constants.shape[-1]
    spread = {layer: torch.zeros(n_heads, d_head, dtype=torch.float64) for layer, _ in heads}
    for (layer, head), constant in zip(heads, constants.double(), strict=True):
        spread[layer][head] = constant
    grouped = {layer: own.unflatten(0, (-1, heads_per_bias)) for layer, own in spread.items()}
    for layer, groups in grouped.items():
        if not torch.equal(groups, groups[:, :1].expand_as(groups)):
            raise RequestError(
                f"expected the same constant in all heads that share a value head, got others in layer {layer}; "
                f"serve it "
                "by lcc_lens.load_restored"
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
    restoration: Restoration, path: Path, slots: JointSlots, loaded: LoadedModel
) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
    """The tensors to replace (weights, biases that are there) and to add (biases that the configuration brings).

    Raises:
        RequestError: heads that share a value bias have different constants.
    """
    stored = tensor_names(path)
    changed = _ChangedWeights(restoration, stored, is_transposed=loaded.is_transposed)
    gains: dict[str, Tensor] = {}
    for found in restoration.constant_sites:
        own = slots.by_site[found.site]
        for layer, gain in _folded(found, own, loaded, stored, changed).items():
            bias = own.biases[layer]  # both sites' where the blocks of a layer are parallel
            gains[bias] = gains[bias] + gain if bias in gains else gain
    replaced: dict[str, Tensor] = {}
    for bias in gains.keys() & stored.keys():
        old = read_tensor(stored, bias)
        replaced[bias] = (old.double() + gains[bias]).to(old.dtype)
    new = slots.new_biases(stored)
    dtype = read_tensor(stored, stored_name(stored, f"{loaded.output_projections[0]}.weight")).dtype
    added = {name: gains.get(name, torch.zeros(shape)).to(dtype) for name, shape in new.items()}
    return ChainMap(replaced, cast("dict[str, Tensor]", changed)), added


def _folded(
    found: SiteConstants,
    slots: BiasSlots,
    loaded: LoadedModel,
    stored: Mapping[str, Path],
    changed: Mapping[str, Tensor],
) -> dict[int, Tensor]:
    """What each layer's bias gains from a site's constants."""
    if slots.place == "value":
        return fold_values(found.values, found.parts, int(loaded.model.cfg.n_heads), slots.heads_per_bias)
    maps = projection_names(loaded.model, found.site)
    weights = {  # constants pass through the changed maps
        layer: _linear_weight(stored, maps[layer], loaded.is_transposed, changed)
        for layer in sorted({part.layer for part in found.parts})
    }
    return fold(found.values, found.parts, weights)


class _ChangedWeights(Mapping[str, Tensor]):
    """The changed weights in the checkpoint's layout and format, each computed when asked for: one at a time in memory.

    Raises, when asked:
        LensError: a zero of a matrix was lost, or a weight is not finite.
    """

    def __init__(self, restoration: Restoration, stored: Mapping[str, Path], *, is_transposed: bool) -> None:
        changes = merged({name: one} for name, one in restoration.changes)
        self._changes = {stored_name(stored, f"{module}.weight"): change for module, change in changes.items()}
        self._stored, self._is_transposed = stored, is_transposed

    def __getitem__(self, name: str) -> Tensor:
        change, old = self._changes[name], read_tensor(self._stored, name)
        is_turned = self._is_transposed and old.ndim > 1
        with torch.no_grad():
            new = change(old.float().T).T if is_turned else change(old.float())
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


def _linear_weight(
    stored: Mapping[str, Path], reader: str, is_transposed: bool, changed: Mapping[str, Tensor]
) -> Tensor:
    """The weight of a map that reads a site as ``[d_model, width]``."""
    name = stored_name(stored, f"{reader}.weight")
    weight = changed[name] if name in changed else read_tensor(stored, name)
    return weight.T if is_transposed else weight
