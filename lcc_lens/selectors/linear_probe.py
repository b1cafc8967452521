"""The paper's selector: how well a linear probe tells right from wrong answers beside the restored activation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.components import LostComponents
from lcc_lens.errors import RequestError
from lcc_lens.probes import fit_linear_probes, split_pairs

MIN_PAIRS = 4


@dataclass(frozen=True)
class ProbeFeatures:
    """Last-token head outputs of contrastive pairs: the question in the pruned model, both answers in the dense one."""

    z_pruned_question: Float[Tensor, "pair layer head d_head"]
    z_dense_right: Float[Tensor, "pair layer head d_head"]
    z_dense_wrong: Float[Tensor, "pair layer head d_head"]


def score_linear_probe(
    features: ProbeFeatures,
    components: LostComponents,
    *,
    rank: int = 1,
    held_out_share: float = 0.3,
    seed: int = 0,
) -> Float[Tensor, "layer head"]:
    r"""Held-out accuracy of one linear probe per head on $[z_c^q ; z_{dense}^{q+r}]$.

    The edited activation is $z_c^q = z_{pruned}^q + c$ with the head's lost component of the given rank; pairs with
    the right answer are labelled 1, with the wrong one 0; the split keeps pairs together.

    Args:
        features: activations of the pairs.
        components: lost components of the same heads.
        rank: K, the number of directions in the edit (the paper's text says 1, its code 10).
        held_out_share: share of the pairs that the probe does not see.
        seed: of the split and the probe's start.

    Raises:
        RequestError: fewer than 4 pairs.

    Reference: RestoreLCC (arXiv 2510.21834), Eq. 7 and section 4.1.
    """
    n_pairs, n_layers, n_heads, _ = features.z_dense_right.shape
    if n_pairs < MIN_PAIRS:
        raise RequestError(f"wanted at least {MIN_PAIRS} contrastive pairs, got {n_pairs}; scan more examples")
    train, test = split_pairs(n_pairs, held_out_share, seed)
    edited = features.z_pruned_question + components.component(min(rank, components.d_head)).to(features.z_dense_right)

    def design(index: Tensor) -> tuple[Tensor, Tensor]:
        right = torch.cat([edited[index], features.z_dense_right[index]], dim=-1)
        wrong = torch.cat([edited[index], features.z_dense_wrong[index]], dim=-1)
        stacked = torch.cat([right, wrong]).flatten(1, 2).transpose(0, 1)
        return stacked.contiguous(), torch.arange(2 * len(index), device=right.device) < len(index)

    probe = fit_linear_probes(*design(train), seed=seed)
    return probe.accuracy(*design(test)).reshape(n_layers, n_heads).cpu()
