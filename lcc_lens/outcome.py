"""The outcome of a forward pass per example: how likely the response is, and how far from the dense model's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lcc_lens.data.datasets import Batch
from lcc_lens.token_losses import token_nll

_CHUNK = 64  # targets whose distributions over the vocabulary are held in float32 at once


class Outcome(NamedTuple):
    """What a run says of every example of a batch, in nats per response token.

    ``divergence`` is None where it was not asked for.
    """

    log_likelihood: Float[Tensor, " batch"]
    divergence: Float[Tensor, " batch"] | None


def response_log_likelihood(logits: Float[Tensor, "target d_vocab"], batch: Batch) -> Float[Tensor, " batch"]:
    r"""The mean log-likelihood of each example's response, $\frac{1}{|r|} \sum_{t \in r} \log p(t)$; differentiable.

    Args:
        logits: at the batch's targets, in row-major order (see :func:`lcc_lens.hooks.logits_at`).
        batch: the examples.
    """
    return _mean_by_example(-token_nll(logits, batch.targets().to(logits.device)), batch)


def measure(
    logits: Float[Tensor, "target d_vocab"],
    batch: Batch,
    dense_logits: Float[Tensor, "dense_target d_vocab"] | None = None,
    dense_row: Int[Tensor, " target"] | None = None,
) -> Outcome:
    r"""Both outcomes of a run from one pass over its logits, in float32, a few targets at a time.

    The divergence is $\frac{1}{|r|} \sum_t KL(p_{dense}(\cdot_t) \| p(\cdot_t))$ over the positions that predict the
    response: unlike the likelihood it cannot gain by fitting the task instead of the dense model.

    Args:
        logits: at the batch's targets, in row-major order.
        batch: the examples.
        dense_logits: the dense model's logits; the divergence is left out where they are not given.
        dense_row: which row of ``dense_logits`` belongs to each target, if not its own.
    """
    if dense_logits is None:
        return Outcome(response_log_likelihood(logits, batch), None)
    targets = batch.targets().to(logits.device)
    dense_row = torch.arange(len(targets), device=logits.device) if dense_row is None else dense_row
    likelihood, divergence = (logits.new_empty(len(targets), dtype=torch.float32) for _ in range(2))
    for start in range(0, len(targets), _CHUNK):
        part = slice(start, start + _CHUNK)
        log_p = logits[part].float().log_softmax(-1)
        log_dense = dense_logits[dense_row[part]].float().log_softmax(-1)
        likelihood[part] = log_p.gather(-1, targets[part, None])[:, 0]
        divergence[part] = (log_dense.exp() * (log_dense - log_p)).sum(-1)
    return Outcome(_mean_by_example(likelihood, batch), _mean_by_example(divergence, batch))


def _mean_by_example(values: Float[Tensor, " target"], batch: Batch) -> Float[Tensor, " batch"]:
    """The mean of each example's targets; they lie one example after another."""
    counts = batch.is_target().sum(1)
    example = torch.repeat_interleave(torch.arange(len(counts)), counts).to(values.device)
    return values.new_zeros(len(counts)).index_add(0, example, values) / counts.to(values)
