"""How much of a vector in a head's output the output projection passes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.analysis.lens.checks import checked_vector
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head, check_heads
from lcc_lens.core.ranges import ranged
from lcc_lens.core.showing import Shown
from lcc_lens.models.hooked.direct_path import OutputProjections
from lcc_lens.models.hooked.hooks import HookedModel

if TYPE_CHECKING:
    import pandas as pd

_WEAK = 0.01


@dataclass(frozen=True, repr=False)
class OutputRelation(Shown):
    r"""Energy of vectors in head outputs along the singular directions P of $W_O[h] = P \Sigma Q^T$.

    ``energy`` is each vector's fraction of squared norm along each column of P, from the largest singular value to the
    smallest; ``null_share`` the fraction in its null space (zeroed rows); ``gain`` is
    $|v W_O| / (|v|\,\sigma_{max})$ and ``gain_over_random`` $|v W_O| / |v|$ over its root mean square for random v.
    """

    heads: tuple[Head, ...]
    singular_values: Float[Tensor, "chosen d_head"]
    energy: Float[Tensor, "chosen d_head"]
    null_share: Float[Tensor, " chosen"]
    gain: Float[Tensor, " chosen"]
    gain_over_random: Float[Tensor, " chosen"]

    def share_between(self, low: float, high: float) -> Float[Tensor, " chosen"]:
        r"""The fraction of squared norm where $low \le \sigma / \sigma_{max} < high$ (the largest itself is 1)."""
        relative = self.singular_values / self.singular_values[:, :1].clamp_min(torch.finfo(torch.float64).tiny)
        return (self.energy * ((relative >= low) & (relative < high))).sum(-1)

    @property
    def weak_share(self) -> Float[Tensor, " chosen"]:
        """The fraction along singular values below 1 % of the largest, the null space included."""
        return self.share_between(0.0, _WEAK)

    def table(self) -> pd.DataFrame:
        """One row per vector: layer, head, null_share, weak_share, gain, gain_over_random."""
        import pandas as pd

        layers, heads = zip(*self.heads, strict=True)
        names = ("null_share", "weak_share", "gain", "gain_over_random")
        columns: dict[str, Any] = {name: getattr(self, name).tolist() for name in names}
        return pd.DataFrame({"layer": layers, "head": heads, **columns})


@ranged
def relation_to_W_O(
    model: HookedModel, heads: Sequence[Head | tuple[int, int]], vectors: Float[Tensor, "chosen d_head"]
) -> OutputRelation:
    """How much of vectors in head outputs each head's output projection passes on.

    Args:
        model: the hooked model with W_O.
        heads: one per vector; a head may occur more than once.
        vectors: for instance lost components or a restoration's constants.

    Raises:
        RequestError: a head is not in the model, shapes differ, or a vector is zero.
    """
    chosen = tuple(Head(*head) for head in heads)
    check_heads(set(chosen), int(model.cfg.n_layers), int(model.cfg.n_heads))
    if len(chosen) != len(vectors):
        raise RequestError(f"expected one vector per head, got {len(vectors)} for {len(chosen)} heads; match them")
    v = torch.stack([checked_vector(model, vector).double().cpu() for vector in vectors])
    v = v / v.norm(dim=-1, keepdim=True)
    projections = OutputProjections.of(model)
    W_O = torch.stack([projections.W_O(head).double().cpu() for head in chosen])
    rows, sigma, _ = torch.linalg.svd(W_O, full_matrices=W_O.shape[1] > W_O.shape[2])
    sigma = torch.nn.functional.pad(sigma, (0, rows.shape[-1] - sigma.shape[-1]))
    energy = torch.einsum("cd,cdk->ck", v, rows).square()
    largest = sigma[:, :1]
    is_null = sigma <= max(W_O.shape[1:]) * torch.finfo(torch.float64).eps * largest
    length = torch.einsum("cd,cdm->cm", v, W_O).norm(dim=-1)
    typical = W_O.square().sum((1, 2)).div(W_O.shape[1]).sqrt()
    gain = torch.where(largest[:, 0] > 0, length / largest[:, 0], torch.zeros_like(length))
    return OutputRelation(chosen, sigma, energy, (energy * is_null).sum(-1), gain, length / typical)
