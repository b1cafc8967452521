"""Constants at head outputs or at the MLP: trained magnitudes over lost directions, and their controls."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lcc_lens.analysis.components import LostComponents
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head, check_heads, head_indices
from lcc_lens.models.hooked.hooks import NamedHook
from lcc_lens.models.hooked.sites import ConstantSite, site_adders
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.injections.footprint import Footprint

Start = Literal["zero", "mean"]
#: A constant's learning rate at the MLP: it is wide, and Adam moves all of its coordinates at once.
MLP_LR = 1e-2


def constants_by_layer(
    heads: Sequence[Head], constants: Float[Tensor, "chosen d_head"], n_heads: int
) -> dict[int, Float[Tensor, "head d_head"]]:
    """Spread the constants of chosen heads over whole layers (zero rows elsewhere); differentiable."""
    if not heads:
        return {}
    layers = sorted({head.layer for head in heads})
    row = {layer: i for i, layer in enumerate(layers)}
    layer_index, head_index = head_indices(heads)
    index = torch.tensor([row[layer] for layer in layer_index]), torch.tensor(head_index)
    empty = constants.new_zeros(len(layers), n_heads, constants.shape[-1])
    spread = empty.index_put(tuple(i.to(constants.device) for i in index), constants)
    return dict(zip(layers, spread.unbind(0), strict=True))


@dataclass(frozen=True)
class SiteConstants:
    """Frozen constants at one site, with the magnitudes and offsets that they consist of.

    Parts are heads; an MLP is head 0 of its layer.
    """

    site: ConstantSite
    parts: tuple[Head, ...]
    values: Float[Tensor, "chosen width"]
    magnitudes: Float[Tensor, "chosen component"]
    offset: Float[Tensor, "chosen width"]

    def hooks(self, n_parts: int) -> list[NamedHook]:
        """Hooks that add the constants in a model with ``n_parts`` per layer."""
        return site_adders(self.site, constants_by_layer(self.parts, self.values, n_parts))


class ConstantInjection(Injection):
    """A constant at chosen parts of one site.

    Args:
        site: where: ``z``, the head outputs, or ``mlp``, the MLP's post-activation.
        parts: the chosen heads; of the MLP, head 0 of each chosen layer.
        shape: layers, and parts of each.

    Raises:
        RequestError: a part twice, or outside the model.
    """

    def __init__(self, site: ConstantSite, parts: Sequence[Head], shape: tuple[int, int]) -> None:
        super().__init__()
        self.site, self.n_heads = site, shape[1]
        self.heads = check_heads(parts, *shape)

    @property
    def footprint(self) -> Footprint:
        return Footprint(biases=(self.site,), n_trained=self.n_trained)

    @abstractmethod
    def constants(self) -> Float[Tensor, "chosen width"]:
        """The constant of every chosen part."""

    def hooks(self) -> list[NamedHook]:
        """Hooks that add the current constants; gradients flow into the parameters."""
        return site_adders(self.site, constants_by_layer(self.heads, self.constants(), self.n_heads))

    @torch.no_grad()
    def frozen(self) -> SiteConstants:
        """The current constants; without directions they are all offset."""
        values = self.constants().cpu().clone()
        return SiteConstants(self.site, tuple(self.heads), values, values.new_zeros(len(values), 0), values.clone())


class FixedConstants(ConstantInjection):
    """Measured constants; nothing is trained.

    Args:
        site: see :class:`ConstantInjection`.
        values: by layer and part.
        parts: the chosen ones.
    """

    values: Float[Tensor, "chosen width"]

    def __init__(self, site: ConstantSite, values: Float[Tensor, "layer part width"], parts: Sequence[Head]) -> None:
        super().__init__(site, parts, (values.shape[0], values.shape[1]))
        self.register_buffer("values", values[head_indices(self.heads)].float().clone())

    def constants(self) -> Float[Tensor, "chosen width"]:
        """The measured constant of every chosen part."""
        return self.values


class LccInjection(ConstantInjection):
    r"""A constant per head: trained magnitudes over fixed lost directions plus a free offset.

    $c_{learned} = \sum_{i \le K} \beta_i v_i + b$ with the directions $v_i$ fixed, the magnitudes $\beta_i$ and the
    offset $b$ trained, in float32.

    ``magnitudes`` and ``offset`` are in units of each head's root mean square difference (``unit``). This departs from
    the paper, which uses one learning rate for heads whose differences vary in size: in SmolLM2-135M the size grows
    several hundredfold from the first layer to the last, and a rate that is stable in the first layers hardly moves the
    last ones.

    Args:
        components: lost components of the pair (their directions, and coefficients as a start).
        heads: the heads to restore.
        rank: K; all directions if not given, the offset alone if 0.
        start: ``zero`` begins at the pruned model; ``mean`` begins with $\beta_i = \alpha_i$, the lost component.
        site: where the components were measured; of an MLP, which is wide, a scan holds the first directions.

    Reference: RestoreLCC (arXiv 2510.21834), Eq. 8.
    """

    default_lr = 3e-2
    directions: Float[Tensor, "chosen component d_head"]
    unit: Float[Tensor, "chosen 1"]

    def __init__(
        self,
        components: LostComponents,
        heads: Sequence[Head],
        *,
        rank: int | None = None,
        start: Start = "zero",
        site: ConstantSite = "z",
    ) -> None:
        n_layers, n_heads, n_held, d_head = components.directions.shape
        super().__init__(site, heads, (n_layers, n_heads))
        if site == "mlp":
            self.default_lr = MLP_LR
        rank = n_held if rank is None else rank
        if not 0 <= rank <= n_held:
            most = f"d_head = {d_head}" if site == "z" else f"the {n_held} directions that the scan holds of the MLP"
            raise RequestError(f"expected a rank between 0 (offset alone) and {most}, got {rank}")
        chosen = head_indices(self.heads)
        tiny = torch.finfo(torch.float32).tiny  # avoids division by zero for a head without differences
        self.register_buffer("directions", components.directions[chosen][:, :rank].float().clone())
        self.register_buffer("unit", components.root_mean_square()[chosen].clamp_min(tiny)[:, None])
        coefficients = components.coefficients[chosen][:, :rank].float() / self.unit
        self.magnitudes = nn.Parameter(coefficients if start == "mean" else torch.zeros_like(coefficients))
        self.offset = nn.Parameter(torch.zeros(len(self.heads), d_head))

    def constants(self) -> Float[Tensor, "chosen d_head"]:
        """The learned component of every chosen head."""
        return self.unit * (torch.einsum("ck,ckd->cd", self.magnitudes, self.directions) + self.offset)

    @torch.no_grad()
    def frozen(self) -> SiteConstants:
        """The current constants, magnitudes and offsets, in units of activations."""
        magnitudes, offset = ((self.unit * values).cpu().clone() for values in (self.magnitudes, self.offset))
        return SiteConstants(self.site, tuple(self.heads), self.constants().cpu().clone(), magnitudes, offset)


class OffsetInjection(LccInjection):
    r"""A free constant per head without directions, $c = b$: the control for the directions of Eq. 8.

    Args:
        components: lost components of the pair (their size, and their mean as a start).
        heads: the heads to restore.
        start: ``zero`` begins at the pruned model; ``mean`` at the mean difference.
        site: see :class:`LccInjection`.
    """

    def __init__(
        self,
        components: LostComponents,
        heads: Sequence[Head],
        *,
        start: Start = "zero",
        site: ConstantSite = "z",
    ) -> None:
        super().__init__(components, heads, rank=0, site=site)
        if start == "mean":
            with torch.no_grad():
                self.offset.copy_(components.component()[head_indices(self.heads)] / self.unit)


class MeanShift(LccInjection):
    r"""The mean difference itself, $c = \sum_{i \le K} \alpha_i v_i$ (Eq. 4), in closed form; nothing is trained.

    Args:
        components: lost components of the pair.
        heads: the heads to restore.
        rank: K; the whole mean if not given.
        site: see :class:`LccInjection`.
    """

    def __init__(
        self,
        components: LostComponents,
        heads: Sequence[Head],
        *,
        rank: int | None = None,
        site: ConstantSite = "z",
    ) -> None:
        super().__init__(components, heads, rank=rank, start="mean", site=site)
        if rank is None and components.mean is not None:  # the rest of the mean, outside the stored directions
            with torch.no_grad():
                chosen = head_indices(self.heads)
                self.offset.copy_((components.mean[chosen] - self.constants()) / self.unit)
        self.requires_grad_(False)
