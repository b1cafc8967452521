"""Losses per token and per example, computed for a few tokens at a time so that a large vocabulary fits in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from lcc_lens.core.config import tokens_per_pass
from lcc_lens.core.metrics import perplexity
from lcc_lens.core.progress import track
from lcc_lens.data.batches import Batch, TokenSequence, batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Logits per chunk on a CPU, so that the probabilities stay in its cache; tokens on a GPU, for few kernel launches.
_CPU_LOGITS, _CHUNK = 2**17, 1024
#: Targets at a time whose distributions over the vocabulary are compared with the dense model's.
_TARGET_CHUNK = 64


class Outcome(NamedTuple):
    """Per example of a batch, in nats per response token: the log-likelihood, and the KL divergence if requested."""

    log_likelihood: Float[Tensor, " batch"]
    divergence: Float[Tensor, " batch"] | None


def token_nll(logits: Float[Tensor, "token vocab"], targets: Int[Tensor, " token"]) -> Float[Tensor, " token"]:
    """Negative log-likelihood of each target in nats, in float32 at least."""
    return cast("Tensor", cast("Any", _NegativeLogLikelihood).apply(logits, targets))


def token_kl_divergence(
    dense: Float[Tensor, "token vocab"], logits: Float[Tensor, "token vocab"], temperature: float = 1.0
) -> Float[Tensor, " token"]:
    r"""$T^2\, KL(p_T \Vert q_T)$ of each token in nats, in float32 at least; gradients flow into ``logits`` alone.

    Args:
        dense: logits of p; ``logits``: of q.
        temperature: T, by which both distributions are flattened; the factor keeps the size of gradients (Hinton et
            al., arXiv 1503.02531).
    """
    return cast("Tensor", cast("Any", _KLDivergence).apply(logits, dense, temperature))


class _TokenLoss(torch.autograd.Function):
    """Computes the gradient with the loss and keeps it in the logits' format, instead of several float32 tensors."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        gradient = torch.empty_like(kept)
        for part in _parts(kept):
            gradient[part] = kept[part] * grad_output[part, None]  # float32 until it is stored
        return (gradient, *[None] * (len(ctx.needs_input_grad) - 1))


class _NegativeLogLikelihood(_TokenLoss):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        losses, kept = _allocate(ctx, logits)
        for part in _parts(logits):
            x, target = _below_largest(logits[part]), targets[part, None]
            likely = x.gather(-1, target)
            total = x.exp_().sum(-1, keepdim=True)
            losses[part] = (total.log() - likely)[:, 0]
            if kept is not None:
                kept[part] = x.div_(total).scatter_add_(-1, target, x.new_full(target.shape, -1.0))
        return losses


class _KLDivergence(_TokenLoss):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, dense: Tensor, temperature: float) -> Tensor:
        losses, kept = _allocate(ctx, logits)
        for part in _parts(logits):
            x, y = (_below_largest(values[part]).div_(temperature) for values in (dense, logits))
            p = x.exp()
            total_p = p.sum(-1, keepdim=True)
            mean = x.sub_(y).mul_(p.div_(total_p)).sum(-1)
            q = y.exp_()
            total_q = q.sum(-1, keepdim=True)
            losses[part] = temperature**2 * (mean + (total_q / total_p).log()[:, 0])
            if kept is not None:
                kept[part] = q.div_(total_q).sub_(p).mul_(temperature)
        return losses


def log_normaliser(logits: Float[Tensor, "token vocab"]) -> Float[Tensor, " token"]:
    """The logarithm of the sum of all exponentials, which makes logits log-probabilities, in float32 at least."""
    parts = [torch.logsumexp(_wide(logits[part]), dim=-1) for part in _parts(logits)]
    return torch.cat(parts) if parts else logits.new_empty(0)


def _allocate(ctx: Any, logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """Empty tensors for the losses, and for the gradient if autograd needs it."""
    kept = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
    if kept is not None:
        ctx.save_for_backward(kept)
    return torch.empty_like(logits[:, 0], dtype=_wide(logits[:0]).dtype), kept


def _parts(logits: Tensor) -> Iterator[slice]:
    size = max(1, _CPU_LOGITS // logits.shape[1]) if logits.device.type == "cpu" else _CHUNK
    return (slice(start, start + size) for start in range(0, logits.shape[0], size))


def _below_largest(logits: Tensor) -> Tensor:
    """Logits minus the largest of each token, so that no exponential overflows; a tensor of its own."""
    wide = _wide(logits)
    return wide - wide.amax(-1, keepdim=True)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def response_log_likelihood(logits: Float[Tensor, "target d_vocab"], batch: Batch) -> Float[Tensor, " batch"]:
    r"""The mean log-likelihood of each example's response, $\frac{1}{|r|} \sum_{t \in r} \log p(t)$; differentiable.

    Args:
        logits: at the batch's targets, in row-major order (see :func:`lcc_lens.models.hooked.hooks.logits_at`).
    """
    return _mean_by_example(-token_nll(logits, batch.targets().to(logits.device)), batch)


def measure(
    logits: Float[Tensor, "target d_vocab"],
    batch: Batch,
    dense_logits: Float[Tensor, "dense_target d_vocab"] | None = None,
    dense_row: Int[Tensor, " target"] | None = None,
) -> Outcome:
    r"""The log-likelihood of each example's response, and its KL divergence from the dense model, in float32.

    The divergence is $\frac{1}{|r|} \sum_t KL(p_{dense}(\cdot_t) \| p(\cdot_t))$ over the positions that predict the
    response; unlike the likelihood, it does not improve by fitting the task instead of the dense model.

    Args:
        logits: at the batch's targets, in row-major order.
        dense_logits: the dense model's logits; no divergence is computed if not given.
        dense_row: the row of ``dense_logits`` for each target; the same row if not given.
    """
    if dense_logits is None:
        return Outcome(response_log_likelihood(logits, batch), None)
    targets = batch.targets().to(logits.device)
    dense_row = torch.arange(len(targets), device=logits.device) if dense_row is None else dense_row
    likelihood, divergence = (logits.new_empty(len(targets), dtype=torch.float32) for _ in range(2))
    for start in range(0, len(targets), _TARGET_CHUNK):
        part = slice(start, start + _TARGET_CHUNK)
        likelihood[part] = -token_nll(logits[part], targets[part])
        divergence[part] = token_kl_divergence(dense_logits[dense_row[part]], logits[part])
    return Outcome(_mean_by_example(likelihood, batch), _mean_by_example(divergence, batch))


def _mean_by_example(values: Float[Tensor, " target"], batch: Batch) -> Float[Tensor, " batch"]:
    """The mean over each example's targets, which are in the order of the examples."""
    counts = batch.is_target().sum(1)
    example = torch.repeat_interleave(torch.arange(len(counts)), counts).to(values.device)
    return values.new_zeros(len(counts)).index_add(0, example, values) / counts.to(values)


def logits_where(
    model: PreTrainedModel,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    *,
    attention_mask: Float[Tensor, "batch 1 pos pos"] | None = None,
    position_ids: Int[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "target vocab"]:
    """A plain model's logits at the masked positions, in row-major order; the unembedding computes no others.

    Args:
        attention_mask: what is added to attention scores; causal attention if not given.
        position_ids: counted from 0 in every row if not given.
    """
    given = {"attention_mask": attention_mask, "position_ids": position_ids}
    unembedding = model.get_output_embeddings()
    handle = unembedding.register_forward_pre_hook(lambda module, inputs: (inputs[0][mask][None],))
    try:
        logits: Tensor = model(
            tokens, use_cache=False, **{name: value for name, value in given.items() if value is not None}
        ).logits[0]
    finally:
        handle.remove()
    return logits


def sequence_loss(
    model: PreTrainedModel, sequences: Sequence[TokenSequence], *, batch_tokens: int | None = None
) -> dict[str, float]:
    """The mean loss per counted token of a plain model over sequences.

    Returns:
        ``loss`` in nats per token, ``perplexity``, ``tokens`` (counted) and ``sequences``.
    """
    total, count = 0.0, 0
    grouped = batches(sequences, max_tokens=batch_tokens or tokens_per_pass(model.device))
    with torch.inference_mode():
        for batch in track(grouped, len(grouped), "loss"):
            logits = logits_where(model, batch.tokens.to(model.device), batch.is_target().to(model.device))
            nll = token_nll(logits, batch.targets().to(model.device))
            total += float(nll.double().sum())
            count += len(nll)
    return {"loss": total / count, "perplexity": perplexity(total, count), "tokens": count, "sequences": len(sequences)}
