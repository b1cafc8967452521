"""The weights of a layer's attention, with queries and keys, and values, from the dense or the pruned model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from lcc_lens.analysis.causes.swapped import PlainModule
from lcc_lens.core.errors import RequestError
from lcc_lens.models.pair import Pair

#: Projections of queries, keys and values in one matrix: in this order, or interleaved by key-value head.
_SEPARATE = ("q_proj", "k_proj", "v_proj")
_JOINED, _INTERLEAVED = ("qkv_proj", "c_attn", "Wqkv"), ("query_key_value",)


class AttentionWeights:
    """The weights of a layer's attention in the pruned model and, at the same heads, in the dense one.

    Raises:
        RequestError: the dense model lacks a parameter, or has one in another shape.
    """

    def __init__(self, pair: Pair, layer: int) -> None:
        self.plain = PlainModule.of(pair.pruned, layer, "attn")
        self.pruned = {name: parameter.value for name, parameter in self.plain.parameters.items()}
        dense, n_dense = PlainModule.of(pair.dense, layer, "attn").values(), int(pair.dense.cfg.n_heads)
        heads = pair.head_map.dense_heads[layer]
        if heads != tuple(range(n_dense)):
            for name, parameter in self.plain.parameters.items():
                axis = parameter.row_axis
                rows = head_rows(name, dense[name].shape[axis], n_dense, pair.d_head)
                if any(map(len, rows)):
                    dense[name] = dense[name].index_select(
                        axis, _kept_rows(rows, heads, n_dense).to(dense[name].device)
                    )
        self.dense = matched(dense, self.pruned, layer)
        self._value_rows = {
            name: head_rows(name, self.pruned[name].shape[parameter.row_axis], pair.n_heads, pair.d_head)[2].flatten()
            for name, parameter in self.plain.parameters.items()
        }

    def chosen(self, *, qk_dense: bool, v_dense: bool) -> dict[str, Tensor]:
        """The weights with queries and keys, and values, from the dense or the pruned model."""
        qk, v = (self.dense if is_dense else self.pruned for is_dense in (qk_dense, v_dense))
        return {name: self._joined(name, qk[name], v[name]) for name in qk}

    def _joined(self, name: str, qk: Tensor, v: Tensor) -> Tensor:
        rows, axis = self._value_rows[name].to(qk.device), self.plain.parameters[name].row_axis
        if qk is v or not len(rows):
            return qk
        return v if len(rows) == qk.shape[axis] else qk.index_copy(axis, rows, v.index_select(axis, rows))


def head_rows(name: str, n_rows: int, n_heads: int, d_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of a parameter of attention that compute queries, keys and values, each ``[head, d_head]``.

    All are empty for a parameter that belongs to no head, such as that of a norm.

    Args:
        name: of the parameter, such as ``v_proj.weight``.
        n_rows: its outputs.
    """
    words, none = set(name.split(".")), torch.zeros(0, d_head, dtype=torch.long)
    if not words & {*_SEPARATE, *_JOINED, *_INTERLEAVED}:
        return none, none, none
    rows = torch.arange(n_rows).reshape(-1, d_head)
    if words & {*_SEPARATE}:
        queries, keys, values = (rows if separate in words else none for separate in _SEPARATE)
        return queries, keys, values
    n_groups = (len(rows) - n_heads) // 2
    if words & {*_JOINED}:
        return rows[:n_heads], rows[n_heads : n_heads + n_groups], rows[n_heads + n_groups :]
    by_group = rows.reshape(n_groups, -1, d_head)
    return by_group[:, :-2].flatten(0, 1), by_group[:, -2], by_group[:, -1]


def matched(dense: Mapping[str, Tensor], pruned: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The dense tensors in place of the pruned ones; zeros for a bias that only the second model has."""
    for name in sorted({*dense, *pruned}):
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (dense, pruned)]
        if shapes[0] != shapes[1] and not (shapes[0] is None and name.endswith("bias")):
            raise RequestError(
                f"expected {name} of layer {layer} in the same shape in both models, got {shapes[0]} and {shapes[1]}; "
                "scan without causes"
            )
    return {name: dense[name].to(own) if name in dense else torch.zeros_like(own) for name, own in pruned.items()}


def _kept_rows(rows: Sequence[Tensor], heads: Sequence[int], n_heads: int) -> Int[Tensor, " row"]:
    """The rows of some query heads and of their key-value heads, in the order of the parameter."""
    kept = [rows[0][list(heads)]] if len(rows[0]) else []
    for group_rows in rows[1:]:
        if len(group_rows):
            kept.append(group_rows[sorted({head * len(group_rows) // n_heads for head in heads})])
    return torch.cat(kept).flatten().sort().values
