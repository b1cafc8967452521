"""Slicing: cut the rows and columns that pruning emptied out of the shapes, and change the configuration to match."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.errors import RequestError
from lcc_lens.models.architecture.anatomy import Block, LayerAnatomy
from lcc_lens.models.architecture.layers import read_config, skeleton
from lcc_lens.models.architecture.linear_maps import Matrix
from lcc_lens.pruning.methods.pruners import Removed
from lcc_lens.pruning.methods.slimgpt import Quota

_NONE = torch.empty(0, dtype=torch.long)


@dataclass(frozen=True)
class Cut:
    """The rows (outputs) and columns (inputs) that one matrix loses."""

    matrix: Matrix
    rows: Int[Tensor, " row"]
    columns: Int[Tensor, " column"]

    def apply(self, stored: Tensor) -> Tensor:
        """The smaller weight, in the checkpoint's layout."""
        weight = self.matrix.rows(stored)
        kept = weight[_others(self.rows, weight.shape[0])][:, _others(self.columns, weight.shape[1])]
        return self.matrix.stored(kept)

    def apply_to_bias(self, bias: Tensor) -> Tensor:
        """The smaller bias, with one entry per row."""
        return bias[_others(self.rows, len(bias))]


def layer_cuts(anatomy: LayerAnatomy, removed: Removed) -> list[Cut]:
    """The cuts of all matrices of a layer."""
    return [*_block_cuts(anatomy.attention, removed.groups), *_block_cuts(anatomy.mlp, removed.neurons)]


def sliced_config(model_dir: Path, anatomy: LayerAnatomy, quota: Quota) -> dict[str, Any]:
    """The entries of ``config.json`` that describe the smaller model; heads keep their size."""
    config = read_config(model_dir).get_text_config()
    n_groups = anatomy.attention.n_groups - quota.groups
    return {
        "num_attention_heads": n_groups * anatomy.heads_per_group,
        "num_key_value_heads": n_groups,
        "head_dim": anatomy.attention.output.d_in // int(config.num_attention_heads),
        "intermediate_size": anatomy.mlp.n_groups - quota.neurons,
    }


def allowed_groups(model_dir: Path, anatomy: LayerAnatomy) -> frozenset[int]:
    """Numbers of key-value groups that may be removed so that the configuration accepts the number of heads.

    Llama's, for one, requires a number of heads that divides the model's width, whatever the size of a head.
    """
    numbers = range(anatomy.attention.n_groups)
    return frozenset(n for n in numbers if _changed(model_dir, sliced_config(model_dir, anatomy, Quota(n, 0)))[0])


def require_sliceable(
    model_dir: Path, anatomies: Sequence[LayerAnatomy], quota: Quota, changes: Mapping[str, Any]
) -> None:
    """Check, before any work, that the architecture's standard configuration can describe the smaller model.

    Raises:
        RequestError: under the changed configuration a parameter has another shape than slicing gives it.
    """
    config = read_config(model_dir)
    dense = {name: tuple(p.shape) for name, p in skeleton(model_dir, config).named_parameters()}
    changed, reason = _changed(model_dir, changes)
    if changed is None:
        raise _not_sliceable(config.model_type, reason)
    try:
        changed_shapes = {name: tuple(p.shape) for name, p in skeleton(model_dir, changed).named_parameters()}
    except RequestError as error:
        raise _not_sliceable(config.model_type, str(error)) from error
    sliced_shapes = {**dense, **_sliced_shapes(dense, anatomies, quota)}
    for name in sorted(sliced_shapes.keys() | changed_shapes.keys()):
        shape, sliced = changed_shapes.get(name), sliced_shapes.get(name)
        if shape != sliced:
            raise _not_sliceable(config.model_type, f"{name} would be {shape} instead of {sliced}")


class SlicedTensors(Mapping[str, Tensor]):
    """The smaller weights, and the smaller biases where the checkpoint has any; each made on access.

    Args:
        cuts: the cuts of all matrices.
        weights: zeroed weights by name, in the checkpoint's layout.
        dense: the dense checkpoint.
    """

    def __init__(self, cuts: Sequence[Cut], weights: Mapping[str, Tensor], dense: Checkpoint) -> None:
        self._weights, self._dense = weights, dense
        self._cuts = {cut.matrix.name: cut for cut in cuts}
        biases = {f"{name.removesuffix('.weight')}.bias": cut for name, cut in self._cuts.items() if len(cut.rows)}
        self._bias_cuts = {name: cut for name, cut in biases.items() if name in dense.tensors}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._cuts:
            return self._cuts[name].apply(self._weights[name])
        return self._bias_cuts[name].apply_to_bias(self._dense.read(name))

    def __iter__(self) -> Iterator[str]:
        yield from self._cuts
        yield from self._bias_cuts

    def __len__(self) -> int:
        return len(self._cuts) + len(self._bias_cuts)


def _block_cuts(block: Block, gone: Int[Tensor, " group"]) -> list[Cut]:
    output = Cut(block.output, _NONE, block.columns[gone].flatten())
    return [output, *(Cut(matrix, rows[gone].flatten(), _NONE) for matrix, rows in block.inputs)]


def _sliced_shapes(
    dense: Mapping[str, tuple[int, ...]], anatomies: Sequence[LayerAnatomy], quota: Quota
) -> dict[str, tuple[int, ...]]:
    """Shapes after slicing, by the parameter's name in the model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for anatomy in anatomies:
        removed = Removed(groups=torch.arange(quota.groups), neurons=torch.arange(quota.neurons))
        for cut in layer_cuts(anatomy, removed):
            for name, shape in dense.items():
                is_bias = name.endswith(f"{cut.matrix.name.removesuffix('.weight')}.bias")
                if name.endswith(cut.matrix.name):
                    n_rows, n_columns = shape[::-1] if cut.matrix.is_transposed else shape
                    smaller = (n_rows - len(cut.rows), n_columns - len(cut.columns))
                    shapes[name] = smaller[::-1] if cut.matrix.is_transposed else smaller
                elif is_bias:
                    shapes[name] = (shape[0] - len(cut.rows),)
    return shapes


def _changed(model_dir: Path, changes: Mapping[str, Any]) -> tuple[Any, str]:
    """The configuration with changed entries, rebuilt so that its own checks run; or None and the reason."""
    config = read_config(model_dir)
    if config.get_text_config() is not config:
        return None, "more than a text model"
    try:
        return type(config).from_dict({**config.to_dict(), **changes}), ""
    except Exception as error:  # every family has checks and errors of its own
        return None, str(error).strip().splitlines()[-1].strip()


def _not_sliceable(model_type: str, reason: str) -> RequestError:
    return RequestError(
        f"expected an architecture whose configuration holds fewer heads of the same size, got {model_type} "
        f"({reason}); leave out --sliced"
    )


def _others(gone: Int[Tensor, " index"], n: int) -> Tensor:
    """A mask of all positions but some."""
    kept = torch.ones(n, dtype=torch.bool)
    kept[gone] = False
    return kept
