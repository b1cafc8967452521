"""Sums over the parts of a difference, and the statistics that they give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lcc_lens.analysis.components import effective_rank
from lcc_lens.core.showing import Shown


@dataclass(frozen=True, repr=False)
class PartStatistics(Shown):
    r"""How causes divide the difference at one site of every layer.

    With $\delta_n = \sum_c \delta_n^{(c)}$ the difference of sample n and its parts by cause:

    ``fraction`` is $\sum_n \delta_n^{(c)} \cdot \delta_n / \sum_n |\delta_n|^2$; fractions sum to 1, and one is
    negative where a cause makes the difference smaller. NaN where there is no difference, or where pruning removed
    the head. ``stderr`` is its standard error over examples. ``mean`` is $\bar\delta^{(c)}$, ``squared``
    $\sum_n |\delta_n^{(c)}|^2$, and ``singular_values`` are those of the stacked parts.
    """

    causes: tuple[str, ...]
    n_samples: int
    fraction: Float[Tensor, "layer part cause"]
    stderr: Float[Tensor, "layer part cause"]
    mean: Float[Tensor, "layer part cause width"]
    squared: Float[Tensor, "layer part cause"]
    squared_difference: Float[Tensor, "layer part"]
    own: Float[Tensor, "layer part"]
    """The mean squared own part per coordinate: that of all causes but the first."""
    own_stderr: Float[Tensor, "layer part"]
    singular_values: Float[Tensor, "layer part cause width"] | None = None

    def _facts(self) -> dict[str, Any]:
        fractions = self.fraction.double().nanmean((0, 1)).tolist()
        return {
            "samples": self.n_samples,
            **{cause: f"{100 * f:.1f} %" for cause, f in zip(self.causes, fractions, strict=True)},
        }

    @property
    def constant_fraction(self) -> Float[Tensor, "layer part cause"]:
        r"""$N|\bar\delta^{(c)}|^2 / \sum_n|\delta_n^{(c)}|^2$: how much of a part is the same for every sample."""
        constant = self.n_samples * self.mean.square().sum(-1)
        return torch.where(self.squared > 0, constant / self.squared, 0.0).clamp_max(1.0)

    @property
    def effective_rank(self) -> Float[Tensor, "layer part cause"] | None:
        """The effective number of directions of every part (see :attr:`LostComponents.effective_rank`)."""
        return None if self.singular_values is None else effective_rank(self.singular_values)

    def by_cause(self) -> dict[str, Float[Tensor, "layer part"]]:
        """The fractions by name."""
        return dict(zip(self.causes, self.fraction.unbind(-1), strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


class RunningParts:
    """Sums over the parts of differences; memory does not grow with the number of samples.

    Args:
        n_parts: parts per layer (heads, or 1), each ``width`` wide.
        spectra: also sum the parts' outer products.
    """

    def __init__(
        self, causes: tuple[str, ...], n_layers: int, n_parts: int, width: int, device: torch.device, *, spectra: bool
    ) -> None:
        self.causes, self.width, self.device, self.n_samples, self.n_examples = causes, width, device, 0, 0
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.squared_counts = 0

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(n_layers, n_parts, *shape, dtype=self.dtype, device=device)

        n = len(causes)
        self.sums = {name: zeros() for name in ("difference", "difference2", "own", "own2", "own_by_n")}
        self.sums |= {name: zeros(n) for name in ("along", "along2", "along_by_difference", "squared")}
        self.sums["total"] = zeros(n, width)
        if spectra:
            self.sums["moment"] = zeros(n, width, width)

    def update(
        self, layer: int, parts: Float[Tensor, "cause sample part width"], example: Int[Tensor, " sample"]
    ) -> None:
        """Add one layer's parts on a batch; ``example`` counts from 0 within the batch, and every one is whole."""
        difference, own, sums = parts.sum(0), parts[1:].sum(0), self.sums
        counts = torch.bincount(example).to(parts.device, self.dtype)

        def by_example(values: Tensor) -> Tensor:
            values = values.to(self.dtype)  # the standard error is a small difference of large sums
            return values.new_zeros(len(counts), *values.shape[1:]).index_add_(0, example, values)

        squared = by_example(difference.square().sum(-1))
        along = by_example((parts * difference).sum(-1).permute(1, 2, 0))
        own_squared = by_example(own.square().sum(-1))
        added = {
            "difference": squared.sum(0), "difference2": squared.square().sum(0),
            "own": own_squared.sum(0), "own2": own_squared.square().sum(0),
            "own_by_n": (own_squared * counts[:, None]).sum(0),
            "along": along.sum(0), "along2": along.square().sum(0),
            "along_by_difference": (along * squared[..., None]).sum(0),
            "squared": parts.square().sum((1, 3)).T, "total": parts.sum(1).transpose(0, 1),
        }  # fmt: skip
        if "moment" in sums:
            by_part = parts.permute(2, 0, 1, 3)
            added["moment"] = by_part.transpose(2, 3) @ by_part
        for name, value in added.items():
            sums[name][layer] += value

    def count(self, example: Int[Tensor, " sample"]) -> None:
        """Count one batch's samples and examples."""
        counts = torch.bincount(example)
        self.n_samples += int(counts.sum())
        self.n_examples += int((counts > 0).sum())
        self.squared_counts += int(counts.square().sum())

    def state(self) -> dict[str, Tensor]:
        """The sums so far, for resuming."""
        return {**self.sums, "counts": torch.tensor([self.n_samples, self.n_examples, self.squared_counts])}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Resume from the sums of :meth:`state`."""
        self.n_samples, self.n_examples, self.squared_counts = (int(n) for n in state["counts"])
        self.sums = {name: state[name].to(self.sums[name]) for name in self.sums}

    def finish(self) -> PartStatistics:
        """The statistics of all samples so far."""
        sums, n = self.sums, max(self.n_samples, 1)
        difference = sums["difference"][..., None]
        fraction = torch.where(difference > 0, sums["along"] / difference, torch.nan)
        spread = _residual(
            fraction, sums["along2"], sums["along_by_difference"], sums["difference2"][..., None], self.n_examples
        )
        own = sums["own"] / n
        own_spread = _residual(
            own, sums["own2"], sums["own_by_n"], own.new_tensor(self.squared_counts), self.n_examples
        )
        moment = sums.get("moment")
        values = None if moment is None else torch.linalg.eigvalsh(moment).flip(-1).clamp_min(0).sqrt()
        finished: Mapping[str, Tensor | None] = {
            "fraction": fraction, "stderr": spread / difference, "mean": sums["total"] / n, "squared": sums["squared"],
            "squared_difference": sums["difference"], "singular_values": values,
            "own": own / self.width, "own_stderr": own_spread / n / self.width,
        }  # fmt: skip
        tensors: dict[str, Any] = {name: value.float().cpu() for name, value in finished.items() if value is not None}
        return PartStatistics(self.causes, self.n_samples, **tensors)


def _residual(ratio: Tensor, above2: Tensor, product: Tensor, below2: Tensor, n_examples: int) -> Tensor:
    r"""$\sqrt{\sum_e (a_e - r b_e)^2 \cdot n / (n - 1)}$, the numerator of the standard error of a ratio of sums."""
    if n_examples < 2:
        return torch.full_like(ratio, torch.nan)
    squares = above2 - 2 * ratio * product + ratio.square() * below2
    return (squares.clamp_min(0) * n_examples / (n_examples - 1)).sqrt()
