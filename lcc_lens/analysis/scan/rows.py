"""Activations that a scan reads on one shard of examples, whatever order their batches come in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from lcc_lens.models.hooked.activations import Site
from lcc_lens.models.pair import Pair


class Rows:
    """Activations ``[layer, row, part, width]`` of one site at chosen places, filled batch by batch.

    Rows go example by example in the order of the shard, whatever order batches come in.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        ends = torch.tensor(counts).cumsum(0)
        self.start = [0, *ends.tolist()]
        self.layers: dict[int, Tensor] = {}

    def ids(self, members: Sequence[int]) -> Int[Tensor, " sample"]:
        """The rows of some members of the shard, member by member."""
        return torch.cat([torch.arange(self.start[i], self.start[i + 1]) for i in members])

    def put(self, layer: int, ids: Int[Tensor, " sample"], values: Tensor) -> None:
        """Fill some rows of a layer."""
        if layer not in self.layers:
            self.layers[layer] = values.new_empty(self.start[-1], *values.shape[1:])
        self.layers[layer][ids.to(values.device)] = values

    def by_layer(self) -> list[Tensor]:
        """All layers in order."""
        return [self.layers[layer] for layer in range(len(self.layers))]


class DenseReader:
    """Writes the dense model's activations on one batch into rows."""

    def __init__(
        self, pair: Pair, rows: Mapping[Site, Rows], ends: Mapping[str, Rows], members: Sequence[int], n_sampled: int
    ) -> None:
        self.pair, self.rows, self.ends, self.n_sampled = pair, rows, ends, n_sampled
        self.ids = next(iter(rows.values())).ids(members)
        self.members = torch.tensor(members)

    def visit(self, site: Site, layer: int, values: Tensor) -> None:
        values = self.pair.kept_heads(layer, values) if site == "z" else values
        self.rows[site].put(layer, self.ids, values[: self.n_sampled])
        if site == "z" and self.ends:
            question, right = values[self.n_sampled :].split(len(self.members))
            self.ends["question"].put(layer, self.members, question)
            self.ends["right"].put(layer, self.members, right)

    def visit_wrong(self, site: Site, layer: int, values: Tensor) -> None:
        self.ends["wrong"].put(layer, self.members, self.pair.kept_heads(layer, values))


class PrunedReader:
    """Writes the pruned model's activations on one batch into rows; compares a layer once all its rows are filled."""

    def __init__(
        self, rows: Mapping[Site, Rows], question: Rows, members: Sequence[int], compare: Callable[[Site, int], None]
    ) -> None:
        self.rows, self.question, self.members, self.compare = rows, question, torch.tensor(members), compare
        self.ids = next(iter(rows.values())).ids(members)

    def visit(self, site: Site, layer: int, values: Tensor) -> None:
        if len(values) > len(self.ids):
            self.question.put(layer, self.members, values[len(self.ids) :])
        if len(self.ids) == 0:  # a layer that was compared stays so
            return
        self.rows[site].put(layer, self.ids, values[: len(self.ids)])
        if len(self.ids) == self.rows[site].start[-1]:
            self.compare(site, layer)
