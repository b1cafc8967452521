"""Constants at head outputs: trained magnitudes over lost directions, and the controls of that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lcc_lens.components import LostComponents
from lcc_lens.errors import RequestError
from lcc_lens.heads import Head, check_heads, head_indices
from lcc_lens.hooks import NamedHook, z_adders
from lcc_lens.injections.base import Injection

Start = Literal["zero", "mean"]


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


class LccInjection(Injection):
    r"""A constant per head: trained magnitudes over fixed lost directions plus a free offset.

    $c_{learned} = \sum_{i \le K} \beta_i v_i + b$ with the directions $v_i$ fixed, the magnitudes $\beta_i$ and the
    offset $b$ trained. All numbers are float32 whatever the model computes in: steps of 1e-3 are lost in bfloat16.

    ``magnitudes`` and ``offset`` are held in units of each head's root mean square difference (``unit``). This departs
    from the paper, whose one learning rate meets heads of very different size: in SmolLM2-135M that size grows
    several hundredfold from the first layer to the last, and the rate that the first layers bear leaves the last
    ones where they are.

    Args:
        components: lost components of the pair (their directions, and coefficients as a start).
        heads: the heads to restore.
        rank: K; all directions if not given, the offset alone if 0.
        start: ``zero`` begins at the pruned model; ``mean`` begins with $\beta_i = \alpha_i$, the lost component.

    Reference: RestoreLCC (arXiv 2510.21834), Eq. 8.
    """

    default_lr = 3e-2
    directions: Float[Tensor, "chosen component d_head"]
    unit: Float[Tensor, "chosen 1"]

    def __init__(
        self, components: LostComponents, heads: Sequence[Head], *, rank: int | None = None, start: Start = "zero"
    ) -> None:
        super().__init__()
        n_layers, n_heads, _, d_head = components.directions.shape
        rank = d_head if rank is None else rank
        if not 0 <= rank <= d_head:
            raise RequestError(f"wanted a rank between 0 (offset alone) and d_head = {d_head}, got {rank}")
        self.heads = check_heads(heads, n_layers, n_heads)
        self.n_heads = n_heads
        chosen = head_indices(self.heads)
        tiny = torch.finfo(torch.float32).tiny  # a head that lost nothing keeps its output
        self.register_buffer("directions", components.directions[chosen][:, :rank].float().clone())
        self.register_buffer("unit", components.root_mean_square()[chosen].clamp_min(tiny)[:, None])
        coefficients = components.coefficients[chosen][:, :rank].float() / self.unit
        self.magnitudes = nn.Parameter(coefficients if start == "mean" else torch.zeros_like(coefficients))
        self.offset = nn.Parameter(torch.zeros(len(self.heads), d_head))

    def constants(self) -> Float[Tensor, "chosen d_head"]:
        """The learned component of every chosen head."""
        return self.unit * (torch.einsum("ck,ckd->cd", self.magnitudes, self.directions) + self.offset)

    def hooks(self) -> list[NamedHook]:
        """Hooks that add the present constants to ``hook_z``; gradients flow into the trained numbers."""
        return z_adders(constants_by_layer(self.heads, self.constants(), self.n_heads))


class OffsetInjection(LccInjection):
    r"""A free constant per head without directions, $c = b$: what the directions of Eq. 8 add is seen against it.

    Args:
        components: lost components of the pair (their size, and their mean as a start).
        heads: the heads to restore.
        start: ``zero`` begins at the pruned model; ``mean`` at the mean difference.
    """

    def __init__(self, components: LostComponents, heads: Sequence[Head], *, start: Start = "zero") -> None:
        super().__init__(components, heads, rank=0)
        if start == "mean":
            with torch.no_grad():
                self.offset.copy_(components.component()[head_indices(self.heads)] / self.unit)


class MeanShift(LccInjection):
    r"""The mean difference itself, $c = \sum_{i \le K} \alpha_i v_i$ (Eq. 4): closed form, nothing is trained.

    Args:
        components: lost components of the pair.
        heads: the heads to restore.
        rank: K; all directions if not given, which is the whole mean.
    """

    def __init__(self, components: LostComponents, heads: Sequence[Head], *, rank: int | None = None) -> None:
        super().__init__(components, heads, rank=rank, start="mean")
        self.requires_grad_(False)
