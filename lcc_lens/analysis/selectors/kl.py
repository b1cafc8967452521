"""KL selector: KL divergence between the dense and the pruned head's token distribution in the logit lens."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.analysis.head_scores import HeadScores
from lcc_lens.core.errors import LensError, RequestError

HeadLogits = Callable[[int, Tensor], Tensor]
_CHUNK_BYTES = 192 << 20
_COPIES = 6  # float32 tensors of the logits' size that exist at the same time


def score_kl(
    layers: Iterable[tuple[Float[Tensor, "pair head d_head"], Float[Tensor, "pair head d_head"]]],
    logits: HeadLogits,
    *,
    max_examples: int = 32,
    seed: int = 0,
) -> HeadScores:
    r"""Mean KL divergence of a head's logit-lens distribution, $KL(p(z_{dense}) \| p(z_{pruned}))$, in nats.

    $p(z) = \mathrm{softmax}(\mathrm{LM\_head}(\mathrm{final\_norm}(z W_O[h])))$ is the logit lens of one head (Eq. 6),
    with $z$ its output at the question's last token. The final norm removes the size of $z W_O[h]$, so only its
    direction counts.

    Args:
        layers: layer by layer, the dense and the pruned model's head outputs at the questions' last tokens.
        logits: ``logits(layer, z[pair head d_head]) -> [pair head d_vocab]``, the logit lens of every head.
        max_examples: maximum number of pairs, drawn with ``seed`` (each takes ``4 n_layers n_heads d_model d_vocab``
            operations).

    Raises:
        RequestError: no layer, no pair, or ``max_examples`` below 1.
        LensError: a divergence is NaN or infinite (names layer and head).

    Reference: the "heads by KL" ablation of RestoreLCC (arXiv 2510.21834).
    """
    if max_examples < 1:
        raise RequestError(f"expected max_examples of at least 1, got {max_examples}; raise it")
    by_layer = []
    for layer, (z_dense, z_pruned) in enumerate(layers):
        if not len(z_dense):
            raise RequestError("expected at least one question, got none; add data")
        generator = torch.Generator().manual_seed(seed)  # the same draw for every layer
        drawn = torch.randperm(len(z_dense), generator=generator)[:max_examples].sort().values.to(z_dense.device)
        by_layer.append(_layer_divergence(layer, z_dense[drawn], z_pruned[drawn], logits))
    if not by_layer:
        raise RequestError("expected head outputs of at least one layer, got none; scan again")
    return HeadScores.from_examples("kl", torch.stack(by_layer, dim=1), {"max_examples": max_examples, "seed": seed})


def _layer_divergence(
    layer: int, z_dense: Float[Tensor, "pair head d_head"], z_pruned: Float[Tensor, "pair head d_head"],
    logits: HeadLogits,
) -> Float[Tensor, "pair head"]:  # fmt: skip
    """One layer's KL divergences, in chunks of limited memory."""
    parts: list[Tensor] = []
    start, size = 0, 1  # the size of the vocabulary is known after the first pair
    with torch.inference_mode():
        while start < len(z_dense):
            part = slice(start, start + size)
            dense, pruned = (logits(layer, z[part]).float().log_softmax(-1) for z in (z_dense, z_pruned))
            parts.append((dense.exp() * (dense - pruned)).sum(-1).cpu())
            start += size
            size = max(1, _CHUNK_BYTES // (dense[0].numel() * dense.element_size() * _COPIES))
    divergence = torch.cat(parts)
    bad = (~torch.isfinite(divergence)).any(0).nonzero()
    if len(bad):
        raise LensError(
            f"expected finite divergences, got NaN or infinity in head L{layer}H{int(bad[0])}; check the weights"
        )
    return divergence.clone()
