"""Statistics of the differences between two models' activations, from running sums over the samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lcc_lens.analysis.components import (
    LostComponents,
    components_along,
    components_from_moments,
    effective_rank,
    explained_share,
)
from lcc_lens.core.showing import Shown

#: The outer products of a part wider than this are summed in float32, below the diagonal only, and its statistics keep
#: the spectrum and the first directions.
_WIDE = 512
#: Relative difference of two sums of the same squares, in other batches or number formats.
_ROUNDING = 1e-2
#: Largest size of the square blocks in which they are summed.
_BLOCK = 256
#: Number of first directions that are kept. All of them would take as much memory as the MLP's weights, and a free
#: offset includes the others.
WIDE_DIRECTIONS = 64


@dataclass(frozen=True, repr=False)
class DifferenceStatistics(Shown):
    r"""Differences between both models at one site of every layer: heads, MLP post-activation, or residual stream.

    A *part* is a head where the site has heads, else the layer as a whole (one part). With the differences
    $\delta_n = a_{dense} - a_{pruned}$ over N samples, ``mean_difference`` is $\bar\delta$ and ``squared_dense``,
    ``squared_pruned``, ``squared_difference``, ``dot`` are $\sum_n$ of $|a_{dense}|^2$, $|a_{pruned}|^2$,
    $|\delta_n|^2$ and $a_{dense} \cdot a_{pruned}$. ``mse_stderr`` is the standard error of the mean squared
    difference per coordinate, clustered by example. With a requested spectrum there are ``singular_values`` of the
    stacked differences and, for narrow parts such as heads, ``second_moment``, $\sum_n \delta_n \delta_n^T$; for wide
    ones the first ``directions`` (right singular vectors).
    """

    n_samples: int
    mean_difference: Float[Tensor, "layer part width"]
    squared_dense: Float[Tensor, "layer part"]
    squared_pruned: Float[Tensor, "layer part"]
    squared_difference: Float[Tensor, "layer part"]
    dot: Float[Tensor, "layer part"]
    mse_stderr: Float[Tensor, "layer part"]
    singular_values: Float[Tensor, "layer part width"] | None = None
    second_moment: Float[Tensor, "layer part width width"] | None = None
    directions: Float[Tensor, "layer part component width"] | None = None

    @property
    def width(self) -> int:
        """Coordinates of one part (d_head, d_mlp or d_model)."""
        return self.mean_difference.shape[-1]

    @property
    def relative_loss(self) -> Float[Tensor, "layer part"]:
        r"""$\sqrt{\sum|\delta|^2 / \sum|a_{dense}|^2}$: the relative change of the activation.

        If the dense activation is zero: 0 if nothing changed, else infinite.
        """
        return torch.where(self.squared_difference == 0, 0.0, self.squared_difference / self.squared_dense).sqrt()

    @property
    def cosine(self) -> Float[Tensor, "layer part"]:
        """The cosine between both models' activations over all samples; 1 if both are zero, 0 if one is."""
        norms = self.squared_dense.sqrt() * self.squared_pruned.sqrt()  # the product of squares may overflow float32
        return torch.where(norms > 0, self.dot / norms, (self.squared_difference == 0).to(norms))

    @property
    def constant_share(self) -> Float[Tensor, "layer part"]:
        r"""$N|\bar\delta|^2 / \sum|\delta|^2$: the fraction of the squared difference independent of the input.

        The most that a constant injection can correct; 0 if nothing changed.
        """
        constant = self.n_samples * self.mean_difference.square().sum(-1)
        return torch.where(self.squared_difference > 0, constant / self.squared_difference, 0.0).clamp_max(1.0)

    @property
    def input_share(self) -> Float[Tensor, "layer part"]:
        """The fraction of the squared difference that depends on the input, which no constant corrects."""
        return torch.where(self.squared_difference > 0, 1 - self.constant_share, 0.0)

    @property
    def mse(self) -> Float[Tensor, "layer part"]:
        """The mean squared difference per coordinate."""
        return self.squared_difference / (self.n_samples * self.width)

    @property
    def is_silent(self) -> Bool[Tensor, "layer part"]:
        """Whether the pruned model's activation is zero in every sample."""
        return self.squared_pruned == 0

    @property
    def effective_rank(self) -> Float[Tensor, "layer part"] | None:
        """The effective number of directions of the difference (see :attr:`LostComponents.effective_rank`)."""
        return None if self.singular_values is None else effective_rank(self.singular_values)

    @property
    def explained_share(self) -> Float[Tensor, "layer part width"] | None:
        """The fraction of the squared difference within the first k directions."""
        return None if self.singular_values is None else explained_share(self.singular_values)

    def has_same_dense(self, other: DifferenceStatistics) -> bool:
        """Whether the dense activations are those of another comparison, up to the rounding of other batches."""
        return torch.allclose(self.squared_dense, other.squared_dense, rtol=_ROUNDING, atol=0)

    def components(self) -> LostComponents:
        """The lost components of every part (heads, where the site has heads).

        Wide parts have their first directions only, or none without a spectrum; mean difference and energy are exact.
        """
        if self.second_moment is not None:
            return components_from_moments(self.mean_difference * self.n_samples, self.second_moment, self.n_samples)
        directions, values = self.directions, self.singular_values
        if directions is None or values is None:
            directions, values = self.mean_difference[..., None, :][..., :0, :], self.mean_difference[..., :0]
        values = values[..., : directions.shape[-2]]
        components = components_along(directions, values, self.mean_difference, self.n_samples)
        return replace(components, mean=self.mean_difference, energy=self.squared_difference)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name: everything but the number of samples."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


class RunningDifferences:
    """Sums over the differences at one site of every layer; memory does not grow with the number of samples.

    Args:
        n_parts: parts per layer (heads, or 1), each ``width`` wide.
        device: of the sums, which are float64 if the device has it.
        second_moment: also sum outer products, ``width`` x ``width`` numbers per part.
    """

    def __init__(
        self, n_layers: int, n_parts: int, width: int, device: torch.device, *, second_moment: bool = True
    ) -> None:
        self.dtype = torch.float32 if device.type == "mps" else torch.float64

        def zeros(*shape: int, narrow: bool = False) -> Tensor:
            dtype = torch.float32 if narrow else self.dtype
            return torch.zeros(n_layers, n_parts, *shape, dtype=dtype, device=device)

        self.width, self.device = width, device
        self.n_samples, self.n_examples, self.squared_counts = 0, 0, 0
        self.sums = {name: zeros() for name in ("dense", "pruned", "difference", "dot", "examples", "examples_by_n")}
        self.sums["total"] = zeros(width)
        if second_moment and width <= _WIDE:
            self.sums["moment"] = zeros(width, width)
        if second_moment and width > _WIDE:  # sums of many float32 products: exact to about 1e-6
            self.triangle = Triangle.of(width)
            self.sums["moment"] = zeros(self.triangle.numel, narrow=True)

    def update(
        self,
        layer: int,
        dense: Float[Tensor, "sample part width"],
        pruned: Float[Tensor, "sample part width"],
        example: Int[Tensor, " sample"],
    ) -> None:
        """Add one layer's activations on a batch.

        Args:
            pruned: the pruned model's activations on the same tokens; ``dense``: the dense model's.
            example: the example of each sample, from 0 within the batch; samples of one example are not independent.
                Call :meth:`count` with the same, once per batch.
        """
        dense, pruned = dense.float(), pruned.float()
        difference = dense - pruned
        squared = difference.square().sum(-1).to(self.dtype)  # the standard error is a small difference of large sums
        sums = self.sums
        sums["total"][layer] += difference.sum(0)
        sums["dense"][layer] += dense.square().sum((0, 2))
        sums["pruned"][layer] += pruned.square().sum((0, 2))
        sums["dot"][layer] += (dense * pruned).sum((0, 2))
        sums["difference"][layer] += squared.sum(0)
        counts = torch.bincount(example)
        by_example = squared.new_zeros(len(counts), squared.shape[1]).index_add_(0, example, squared)
        sums["examples"][layer] += by_example.square().sum(0)
        sums["examples_by_n"][layer] += (by_example * counts[:, None]).sum(0)
        if "moment" in sums:
            by_part = difference.transpose(0, 1)
            if self.width > _WIDE:
                for moment, part in zip(sums["moment"][layer], by_part, strict=True):
                    self.triangle.add(moment, part)
            else:
                sums["moment"][layer] += by_part.transpose(1, 2) @ by_part

    def count(self, example: Int[Tensor, " sample"]) -> None:
        """Count one batch's samples and examples."""
        counts = torch.bincount(example)
        self.n_samples += int(counts.sum())
        self.n_examples += int((counts > 0).sum())
        self.squared_counts += int(counts.square().sum())

    def finish(self) -> DifferenceStatistics:
        """The statistics of all samples so far."""
        n, sums = max(self.n_samples, 1), self.sums
        ratio = sums["difference"] / n  # the standard error is that of a ratio of sums over examples
        residual = sums["examples"] - 2 * ratio * sums["examples_by_n"] + ratio.square() * self.squared_counts
        spread = residual.clamp_min(0).sqrt() * (self.n_examples / max(self.n_examples - 1, 1)) ** 0.5 / n
        if self.n_examples < 2:
            spread = torch.full_like(spread, torch.nan)
        moment, values, directions = sums.get("moment"), None, None
        if moment is not None:
            values, directions = self._spectrum(moment)
        return DifferenceStatistics(
            n_samples=self.n_samples,
            mean_difference=(sums["total"] / n).float().cpu(),
            squared_dense=sums["dense"].float().cpu(),
            squared_pruned=sums["pruned"].float().cpu(),
            squared_difference=sums["difference"].float().cpu(),
            dot=sums["dot"].float().cpu(),
            mse_stderr=(spread / self.width).float().cpu(),
            singular_values=values,
            second_moment=None if moment is None or self.width > _WIDE else moment.float().cpu(),
            directions=directions,
        )

    def _spectrum(
        self, moment: Tensor
    ) -> tuple[Float[Tensor, "layer part width"], Float[Tensor, "layer part component width"] | None]:
        """Singular values of the stacked differences from their second moment, and a wide part's first directions."""
        values, directions = [], []
        for layer in moment:
            if self.width <= _WIDE:
                eigenvalues = torch.linalg.eigvalsh(layer)
            else:
                whole = torch.stack([self.triangle.matrix(part) for part in layer])
                eigenvalues, vectors = torch.linalg.eigh(whole)
                directions.append(vectors[..., -WIDE_DIRECTIONS:].flip(-1).transpose(-1, -2).float().cpu())
            values.append(eigenvalues.flip(-1).clamp_min(0).sqrt())
        stacked = torch.stack(directions).contiguous() if directions else None
        return torch.stack(values).float().cpu(), stacked

    def state(self) -> dict[str, Tensor]:
        """The sums so far, for resuming."""
        counts = torch.tensor([self.n_samples, self.n_examples, self.squared_counts])
        return {**self.sums, "counts": counts}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Resume from the sums of :meth:`state`."""
        self.n_samples, self.n_examples, self.squared_counts = (int(n) for n in state["counts"])
        self.sums = {name: state[name].to(self.sums[name]) for name in self.sums}


@dataclass(frozen=True)
class Triangle:
    """A symmetric matrix of sums, of which only square blocks on and below the diagonal are kept, row by row."""

    width: int
    block: int

    @classmethod
    def of(cls, width: int) -> Triangle:
        """Equal blocks of at most the largest size."""
        n = -(-width // _BLOCK)
        return cls(width, -(-width // n))

    @property
    def numel(self) -> int:
        """The number of stored elements."""
        return sum(rows.stop * (rows.stop - rows.start) for rows in self._rows())

    def add(self, kept: Float[Tensor, " kept"], samples: Float[Tensor, "sample width"]) -> None:
        """Add the samples' outer products, in place."""
        samples = samples.to(kept)
        for rows, view in self._views(kept):
            view.addmm_(samples[:, rows].T, samples[:, : rows.stop])

    def matrix(self, kept: Float[Tensor, " kept"]) -> Float[Tensor, "width width"]:
        """The matrix; only its entries on and below the diagonal are correct."""
        whole = kept.new_zeros(self.width, self.width)
        for rows, view in self._views(kept):
            whole[rows, : rows.stop] = view
        return whole

    def _rows(self) -> list[slice]:
        starts = range(0, self.width, self.block)
        return [slice(start, min(start + self.block, self.width)) for start in starts]

    def _views(self, kept: Float[Tensor, " kept"]) -> Iterator[tuple[slice, Float[Tensor, "block columns"]]]:
        start = 0
        for rows in self._rows():
            shape = rows.stop - rows.start, rows.stop
            yield rows, kept[start : start + shape[0] * shape[1]].view(shape)
            start += shape[0] * shape[1]
