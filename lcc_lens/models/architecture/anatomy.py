"""Find the rows and columns of a decoder layer's matrices that belong to one head or one neuron."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lcc_lens.core.errors import RequestError
from lcc_lens.models.architecture.layers import decoder_layers, read_config, skeleton
from lcc_lens.models.architecture.linear_maps import Matrix

# How families name the two output matrices of a layer, seen from the layer.
ATTENTION_OUTPUTS = (
    "self_attn.o_proj", "self_attn.out_proj", "self_attn.dense", "attn.c_proj", "attn.out_proj", "attention.dense",
    "self_attention.dense",
)  # fmt: skip
MLP_OUTPUTS = ("mlp.down_proj", "mlp.fc2", "fc2", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc_out", "ffn.down_proj")
_MLP_INPUTS = ("gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "dense_h_to_4h", "fc_in")


@dataclass(frozen=True)
class Block:
    """One half of a layer: an output matrix, whose columns form groups, and the matrices that compute its inputs."""

    output: Matrix
    """The matrix that loses columns when a group is removed."""
    columns: Int[Tensor, "group column"]
    """Its columns by group."""
    inputs: tuple[tuple[Matrix, Tensor], ...]
    """The matrices that compute its inputs, each with its rows by group, ``[group, row]``."""

    @property
    def n_groups(self) -> int:
        """How many groups the block has."""
        return len(self.columns)

    def group_size(self, d_out: int) -> int:
        """Weights per group in all matrices together; ``d_out`` is the number of rows of the output matrix."""
        return d_out * self.columns.shape[1] + sum(rows.shape[1] * matrix.d_in for matrix, rows in self.inputs)


@dataclass(frozen=True)
class LayerAnatomy:
    """The attention and the feed-forward block of one layer."""

    attention: Block
    mlp: Block
    heads_per_group: int
    """Query heads that share a key-value head, and so are removed together."""
    d_model: int

    @property
    def n_weights(self) -> int:
        """Weights in all matrices of both blocks."""
        return sum(block.n_groups * block.group_size(self.d_model) for block in (self.attention, self.mlp))

    def heads_of(self, group: int) -> list[int]:
        """The query heads of a group."""
        return list(range(group * self.heads_per_group, (group + 1) * self.heads_per_group))


def find_anatomies(model_dir: Path, plan: Sequence[Sequence[Matrix]]) -> list[LayerAnatomy]:
    """The anatomy of every layer of a checkpoint, from names and shapes alone.

    Raises:
        RequestError: the layout is unknown, or its heads cannot be removed one by one.
    """
    config = read_config(model_dir)
    _, layers = decoder_layers(skeleton(model_dir, config), config)
    text = config.get_text_config()
    return [find_anatomy(layer, matrices, text) for layer, matrices in zip(layers, plan, strict=True)]


def find_anatomy(layer: nn.Module, matrices: Sequence[Matrix], config: Any) -> LayerAnatomy:
    """Find heads and neurons in a decoder layer, from names and shapes.

    Args:
        layer: the layer, on any device (also ``meta``).

    Raises:
        RequestError: the layout is unknown, or its heads cannot be removed one by one.
    """
    by_path = {matrix.path: matrix for matrix in matrices}
    attention, heads_per_group = _attention(by_path, layer, config)
    _refuse_joint_norms(layer, attention.output.d_in // int(config.num_attention_heads))
    d_model = _n_rows(layer, attention.output)
    return LayerAnatomy(attention, _mlp(by_path, layer), heads_per_group, d_model)


def _attention(by_path: Mapping[str, Matrix], layer: nn.Module, config: Any) -> tuple[Block, int]:
    output = _one_of(by_path, ATTENTION_OUTPUTS, "attention output")
    n_heads = int(config.num_attention_heads)
    n_groups = int(getattr(config, "num_key_value_heads", None) or n_heads)
    if n_heads % n_groups or output.d_in % n_heads:
        raise RequestError(
            f"expected heads that fall into equal key-value groups, got {n_heads} heads in {n_groups} groups over "
            f"{output.d_in} inputs of {output.name}; use wanda or sparsegpt"
        )
    heads_per_group, d_head = n_heads // n_groups, output.d_in // n_heads
    queries = torch.arange(n_heads * d_head).reshape(n_groups, heads_per_group * d_head)
    keys = torch.arange(n_groups * d_head).reshape(n_groups, d_head)
    module = output.path.rpartition(".")[0]
    inputs = _projections(by_path, module, queries, keys, d_head)
    _require_rows(layer, inputs)
    return Block(output, queries, inputs), heads_per_group


def _projections(
    by_path: Mapping[str, Matrix], module: str, queries: Tensor, keys: Tensor, d_head: int
) -> tuple[tuple[Matrix, Tensor], ...]:
    """The query, key and value projections, separate or fused, with their rows by group."""
    separate = [by_path.get(f"{module}.{name}_proj") for name in "qkv"]
    if all(separate):
        return tuple((m, rows) for m, rows in zip(separate, (queries, keys, keys), strict=True) if m is not None)
    n_queries, n_keys = queries.numel(), keys.numel()
    for name in ("qkv_proj", "c_attn", "Wqkv"):
        if matrix := by_path.get(f"{module}.{name}"):  # queries, then keys, then values
            return ((matrix, torch.cat([queries, n_queries + keys, n_queries + n_keys + keys], dim=1)),)
    matrix = by_path.get(f"{module}.query_key_value")
    if matrix is not None and n_queries == n_keys:  # head by head: query, key and value of each
        return ((matrix, torch.arange(3 * n_queries).reshape(len(queries), 3 * d_head)),)
    raise RequestError(
        f"expected query, key and value projections in {module}, got {', '.join(sorted(by_path))}; "
        "use wanda or sparsegpt"
    )


def _mlp(by_path: Mapping[str, Matrix], layer: nn.Module) -> Block:
    output = _one_of(by_path, MLP_OUTPUTS, "feed-forward output")
    module = output.path.rpartition(".")[0]
    paths = [f"{module}.{name}".lstrip(".") for name in _MLP_INPUTS]
    neurons = torch.arange(output.d_in)[:, None]
    inputs: list[tuple[Matrix, Tensor]] = []
    for matrix in (by_path[path] for path in paths if path in by_path):
        is_fused = matrix.path.endswith("gate_up_proj")
        inputs.append((matrix, torch.cat([neurons, neurons + output.d_in], dim=1) if is_fused else neurons))
    if not inputs:
        raise RequestError(
            f"expected the input matrices that belong to {output.name}, got {', '.join(sorted(by_path))}; "
            "use wanda or sparsegpt"
        )
    _require_rows(layer, inputs)
    return Block(output, neurons, tuple(inputs))


def output_projections(matrices: Sequence[Matrix]) -> list[Matrix]:
    """A layer's output projection and down projection; empty if either has none of the usual names."""
    by_path = {matrix.path: matrix for matrix in matrices}
    named = [[by_path[name] for name in names if name in by_path] for names in (ATTENTION_OUTPUTS, MLP_OUTPUTS)]
    return [matrices[0] for matrices in named] if all(named) else []


def _one_of(by_path: Mapping[str, Matrix], names: Sequence[str], kind: str) -> Matrix:
    for name in names:
        if name in by_path:
            return by_path[name]
    raise RequestError(
        f"expected the {kind} matrix under one of the names {', '.join(names)}, got {', '.join(sorted(by_path))}; "
        "use wanda or sparsegpt"
    )


def _require_rows(layer: nn.Module, inputs: Sequence[tuple[Matrix, Tensor]]) -> None:
    """Refuse projections with rows beyond those of the heads or neurons (gates, fused extras)."""
    for matrix, rows in inputs:
        if (n_rows := _n_rows(layer, matrix)) != rows.numel():
            raise RequestError(
                f"expected {rows.numel()} rows in {matrix.name}, those of its heads or neurons, got {n_rows}; "
                "use wanda or sparsegpt"
            )


def _n_rows(layer: nn.Module, matrix: Matrix) -> int:
    shape = layer.get_submodule(matrix.path).get_parameter("weight").shape
    return int(shape[1 if matrix.is_transposed else 0])


def _refuse_joint_norms(layer: nn.Module, d_head: int) -> None:
    """Refuse norms over the queries or keys of all heads at once (OLMo 2): removing a head would change the others."""
    for name, parameter in layer.named_parameters():
        module = name.split(".")[-2] if "." in name else ""
        if module not in ("q_norm", "k_norm"):
            continue
        if parameter.numel() > d_head:
            raise RequestError(
                f"expected heads that can be removed one by one, got {name}, a norm over all heads together; "
                "use wanda or sparsegpt"
            )
