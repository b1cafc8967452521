"""SlimGPT as a layer pruner: removes whole key-value groups and neurons and refits the output projections."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lcc_lens.core.errors import RequestError
from lcc_lens.models.architecture.anatomy import Block, LayerAnatomy
from lcc_lens.pruning.methods.moments import InputMoments
from lcc_lens.pruning.methods.obs import Damped
from lcc_lens.pruning.methods.pruners import LayerTask, Removed, Split
from lcc_lens.pruning.methods.sparsegpt import damped_with_warning
from lcc_lens.pruning.methods.structured import Removal, cheapest_columns, cheapest_groups, refitted


@dataclass(frozen=True)
class Quota:
    """How many key-value groups and neurons one layer loses."""

    groups: int
    neurons: int


def possible_quotas(
    anatomy: LayerAnatomy, ratio: float, multiple: int = 1, allowed_groups: Collection[int] | None = None
) -> list[Quota]:
    """All ways to divide a layer's fraction between heads and neurons, fewest heads first.

    Key-value groups are few and large. Neurons make up the difference, so that the layer loses its fraction to within
    one neuron (or one ``multiple``, rounded up). At least one group and one neuron stay.

    Args:
        ratio: fraction of the layer's weights to remove.
        multiple: neurons are removed in multiples of this.
        allowed_groups: numbers of groups that may be removed; any number if None.
    """
    group, neuron = (block.group_size(anatomy.d_model) for block in (anatomy.attention, anatomy.mlp))
    target = ratio * anatomy.n_weights
    quotas = []
    for n_groups in range(anatomy.attention.n_groups):
        n_neurons = -(-round((target - n_groups * group) / neuron) // multiple) * multiple
        is_allowed = allowed_groups is None or n_groups in allowed_groups
        if is_allowed and n_groups * group <= target and n_neurons < anatomy.mlp.n_groups:
            quotas.append(Quota(n_groups, n_neurons))
    if not quotas:
        raise RequestError(
            f"expected to remove {ratio:.0%} of a layer in whole heads and neurons, got only "
            f"{anatomy.attention.n_groups} key-value groups and {anatomy.mlp.n_groups} neurons, of which one each "
            "has to stay; lower the sparsity or use wanda or sparsegpt"
        )
    return quotas


def fixed_quota(quotas: Sequence[Quota], split: Split, ratio: float, n_groups: int) -> Quota:
    """The quota of a split that needs no data: heads ``proportional`` to the fraction, or ``spared`` (rounded down)."""
    target = ratio * n_groups
    if split == "proportional":
        return min(quotas, key=lambda quota: abs(quota.groups - target))
    return max((quota for quota in quotas if quota.groups <= target), key=lambda q: q.groups, default=quotas[0])


class SlimGPTPruner:
    """Removes the key-value groups and neurons with the smallest output error after the rest compensates.

    The paper removes the same fraction of heads and of neurons, but a model with three key-value groups can lose none
    or a third of them. So the number of heads is rounded down and neurons make up the difference. The split ``error``
    takes the number of heads with the smallest sum of both blocks' squared errors instead, as both add to the same
    residual stream; on SmolLM2-135M it removes more heads and gives a worse model.

    Two other choices serve as controls without compensation: ``magnitude`` removes the groups and neurons with the
    smallest weights over all matrices, ``random`` random ones.

    Reference:
        Ling et al. 2024, "SlimGPT: Layer-wise Structured Pruning for Large Language Models".
    """

    uses_inputs: ClassVar[bool] = True

    def __init__(self, task: LayerTask) -> None:
        if task.anatomy is None:
            raise RequestError("expected a layer with known heads for slimgpt, got none; use wanda or sparsegpt")
        self._anatomy = task.anatomy
        self._task = task
        self._quotas = possible_quotas(task.anatomy, task.pattern.sparsity, task.multiple, task.allowed_groups)
        self._moments = InputMoments()
        self._generator = torch.Generator().manual_seed(task.seed)
        self._gone: dict[str, Tensor] = {}

    def observe(self, name: str, inputs: Float[Tensor, "token in"]) -> None:
        """Add to the second moment of an output projection's inputs."""
        outputs = (self._anatomy.attention.output.name, self._anatomy.mlp.output.name)
        if self._task.choice == "error" and name in outputs:
            self._moments.add(name, inputs)

    def pruned(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the matrices of both blocks without the removed groups and neurons."""
        blocks = (self._anatomy.attention, self._anatomy.mlp)
        if self._task.choice != "error":
            quota = self._fixed_quota()
            for block, n_remove in zip(blocks, (quota.groups, quota.neurons), strict=True):
                yield from self._without(block, self._control(block, n_remove, weights), weights, None)
            return
        inputs = [damped_with_warning(self._moments[block.output.name], block.output.name) for block in blocks]
        quota = self._fixed_quota() if self._task.split != "error" else self._cheapest_quota(weights, inputs)
        for block, n_remove, damped in zip(blocks, (quota.groups, quota.neurons), inputs, strict=True):
            gone = _cheapest(block, weights[block.output.name], damped, n_remove).order
            yield from self._without(block, gone, weights, damped)

    def removed(self) -> Removed:
        """The removed heads, groups and neurons, in ascending order."""
        groups = self._gone[self._anatomy.attention.output.name].sort().values.cpu()
        neurons = self._gone[self._anatomy.mlp.output.name].sort().values.cpu()
        heads = [head for group in groups.tolist() for head in self._anatomy.heads_of(group)]
        return Removed(torch.tensor(heads, dtype=torch.long), groups, neurons)

    def _fixed_quota(self) -> Quota:
        n_groups, split = self._anatomy.attention.n_groups, self._task.split
        return fixed_quota(self._quotas, split, self._task.pattern.sparsity, n_groups)

    def _cheapest_quota(self, weights: Mapping[str, Tensor], inputs: Sequence[Damped]) -> Quota:
        """The quota with the smallest sum of both blocks' errors."""
        if len(self._quotas) == 1:
            return self._quotas[0]
        attention, mlp = (
            _cheapest(block, weights[block.output.name], damped, most)
            for block, damped, most in zip(
                (self._anatomy.attention, self._anatomy.mlp), inputs,
                (max(q.groups for q in self._quotas), max(q.neurons for q in self._quotas)), strict=True,
            )
        )  # fmt: skip
        return min(self._quotas, key=lambda q: attention.error_at(q.groups) + mlp.error_at(q.neurons))

    def _control(self, block: Block, n_remove: int, weights: Mapping[str, Tensor]) -> Int[Tensor, " removed"]:
        """The groups that a control removes: the smallest, or random ones."""
        if self._task.choice == "magnitude":
            return torch.argsort(_squared_size(block, weights), stable=True)[:n_remove]
        return torch.randperm(block.n_groups, generator=self._generator)[:n_remove]

    def _without(
        self, block: Block, gone: Int[Tensor, " removed"], weights: Mapping[str, Tensor], inputs: Damped | None
    ) -> Iterator[tuple[str, Tensor]]:
        """The matrices of a block without some groups; with ``inputs``, the output projection compensates."""
        weight = weights[block.output.name]
        gone = gone.to(weight.device)
        self._gone[block.output.name] = gone
        columns = block.columns.to(weight.device)[gone].flatten()
        if inputs is not None and len(gone):
            without = refitted(weight, inputs, columns)
        else:  # unchanged bit for bit where nothing is removed
            without = weight.index_fill(1, columns, 0)
        yield block.output.name, without.to(weight.dtype)
        for matrix, rows in block.inputs:
            feeding = weights[matrix.name]
            yield matrix.name, feeding.index_fill(0, rows.to(feeding.device)[gone].flatten(), 0)


def _cheapest(block: Block, weight: Float[Tensor, "out in"], inputs: Damped, n_remove: int) -> Removal:
    columns = block.columns.to(weight.device)
    if columns.shape[1] == 1:
        return cheapest_columns(weight, inputs, n_remove)
    return cheapest_groups(weight, inputs, columns, n_remove)


def _squared_size(block: Block, weights: Mapping[str, Tensor]) -> Float[Tensor, " group"]:
    """The summed squares of each group's weights in all matrices."""
    columns = weights[block.output.name].square().sum(dim=0)
    total = columns[block.columns.to(columns.device)].sum(dim=1)
    for matrix, rows in block.inputs:
        squares = weights[matrix.name].square().sum(dim=1)
        total = total + squares[rows.to(squares.device)].sum(dim=1)
    return total
