"""SlimGPT as a layer pruner: whole key-value groups and neurons go, the output matrices make up for them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lcc_lens.errors import RequestError
from lcc_lens.pruning.anatomy import Block, LayerAnatomy
from lcc_lens.pruning.moments import InputMoments
from lcc_lens.pruning.obs import Damped
from lcc_lens.pruning.pruners import LayerTask, Removed
from lcc_lens.pruning.second_order import damped_and_said
from lcc_lens.pruning.structured import cheapest_columns, cheapest_groups, refitted


@dataclass(frozen=True)
class Quota:
    """How many key-value groups and neurons one layer loses."""

    groups: int
    neurons: int


def layer_quota(
    anatomy: LayerAnatomy, ratio: float, multiple: int = 1, allowed_groups: Collection[int] | None = None
) -> Quota:
    """Split a layer's share between heads and neurons.

    Key-value groups are few and large, so as many go as come nearest to the share; neurons make up the difference, so
    that the layer as a whole loses the share asked for, to within one neuron (or one ``multiple``, rounded up).

    Args:
        anatomy: the layer's heads and neurons.
        ratio: share of the layer's weights to remove.
        multiple: neurons go in multiples of this.
        allowed_groups: numbers of groups that may go; any if not given.

    Raises:
        RequestError: neither can give as much: at least one group and one neuron have to stay.
    """
    group, neuron = (block.group_size(anatomy.d_model) for block in (anatomy.attention, anatomy.mlp))
    target = ratio * anatomy.n_weights
    possible = [n for n in range(anatomy.attention.n_groups) if n * group <= target or n == 0]
    allowed = [n for n in possible if allowed_groups is None or n in allowed_groups]
    n_groups = min(allowed or [0], key=lambda n: abs(n - int(ratio * anatomy.attention.n_groups + 0.5)))
    n_neurons = -(-round((target - n_groups * group) / neuron) // multiple) * multiple
    if n_neurons >= anatomy.mlp.n_groups:
        raise RequestError(
            f"wanted to remove {ratio:.0%} of a layer in whole heads and neurons, got only "
            f"{anatomy.attention.n_groups} key-value groups and {anatomy.mlp.n_groups} neurons, of which one each "
            "has to stay; lower the sparsity or use wanda or sparsegpt"
        )
    return Quota(n_groups, n_neurons)


class SlimGPTPruner:
    """Removes the key-value groups and neurons whose loss the rest of the output matrix can best make up for.

    Two other choices serve as controls, both without compensation: ``magnitude`` removes those with the smallest
    weights in all matrices together, ``random`` any.

    Reference:
        Ling et al. 2024, "SlimGPT: Layer-wise Structured Pruning for Large Language Models".
    """

    uses_inputs: ClassVar[bool] = True

    def __init__(self, task: LayerTask) -> None:
        if task.anatomy is None:
            raise RequestError("wanted a layer with known heads for slimgpt, got none; use wanda or sparsegpt")
        self._anatomy = task.anatomy
        self._task = task
        self._quota = layer_quota(task.anatomy, task.pattern.sparsity, task.multiple, task.allowed_groups)
        self._moments = InputMoments()
        self._generator = torch.Generator().manual_seed(task.seed)
        self._gone: dict[str, Tensor] = {}

    @classmethod
    def for_layer(cls, task: LayerTask) -> SlimGPTPruner:
        """A fresh pruner for one layer."""
        return cls(task)

    def observe(self, name: str, inputs: Float[Tensor, "token in"]) -> None:
        """Add to the second moment of an output matrix's inputs."""
        outputs = (self._anatomy.attention.output.name, self._anatomy.mlp.output.name)
        if self._task.choice == "error" and name in outputs:
            self._moments.add(name, inputs)

    def pruned(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Give the matrices of both blocks, without the removed groups."""
        yield from self._block(self._anatomy.attention, self._quota.groups, weights)
        yield from self._block(self._anatomy.mlp, self._quota.neurons, weights)

    def removed(self) -> Removed:
        """The removed heads, groups and neurons, in ascending order."""
        groups = self._gone[self._anatomy.attention.output.name].sort().values.cpu()
        neurons = self._gone[self._anatomy.mlp.output.name].sort().values.cpu()
        heads = [head for group in groups.tolist() for head in self._anatomy.heads_of(group)]
        return Removed(torch.tensor(heads, dtype=torch.long), groups, neurons)

    def _block(self, block: Block, n_remove: int, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        weight = weights[block.output.name]
        inputs = None
        if self._task.choice == "error" and n_remove:
            inputs = damped_and_said(self._moments[block.output.name], block.output.name)
        gone = self._choose(block, weight, n_remove, inputs, weights)
        self._gone[block.output.name] = gone
        columns = block.columns.to(weight.device)[gone].flatten()
        without = weight.index_fill(1, columns, 0) if inputs is None else refitted(weight, inputs, columns)
        yield block.output.name, without.to(weight.dtype)
        for matrix, rows in block.inputs:
            feeding = weights[matrix.name]
            yield matrix.name, feeding.index_fill(0, rows.to(feeding.device)[gone].flatten(), 0)

    def _choose(
        self,
        block: Block,
        weight: Float[Tensor, "out in"],
        n_remove: int,
        inputs: Damped | None,
        weights: Mapping[str, Tensor],
    ) -> Int[Tensor, " removed"]:
        """The groups to remove, in the order of removal."""
        if self._task.choice == "magnitude":
            return torch.argsort(_squared_size(block, weights), stable=True)[:n_remove]
        if inputs is None:
            return torch.randperm(block.n_groups, generator=self._generator)[:n_remove].to(weight.device)
        columns = block.columns.to(weight.device)
        if columns.shape[1] == 1:
            return cheapest_columns(weight, inputs, n_remove)
        return torch.tensor(cheapest_groups(weight, inputs, columns, n_remove), device=weight.device)


def _squared_size(block: Block, weights: Mapping[str, Tensor]) -> Float[Tensor, " group"]:
    """The summed squares of each group's weights in all matrices."""
    columns = weights[block.output.name].square().sum(dim=0)
    total = columns[block.columns.to(columns.device)].sum(dim=1)
    for matrix, rows in block.inputs:
        squares = weights[matrix.name].square().sum(dim=1)
        total = total + squares[rows.to(squares.device)].sum(dim=1)
    return total
