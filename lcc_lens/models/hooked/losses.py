"""Losses token by token over large vocabularies: a few tokens at a time, with gradients from the same pass."""

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

#: Tokens at a time: on a processor what they make stays in its cache; elsewhere few launches count more.
_CPU_CHUNK, _CHUNK = 64, 1024


def token_nll(logits: Float[Tensor, "token vocab"], targets: Int[Tensor, " token"]) -> Float[Tensor, " token"]:
    """Negative log-likelihood of each target in nats, in float32 at least."""
    return cast("Tensor", cast("Any", _NegativeLogLikelihood).apply(logits, targets))


def token_kl_divergence(
    wanted: Float[Tensor, "token vocab"], got: Float[Tensor, "token vocab"], temperature: float = 1.0
) -> Float[Tensor, " token"]:
    r"""$T^2\, KL(p_T \Vert q_T)$ of each token in nats, in float32 at least; gradients flow into ``got`` alone.

    Args:
        temperature: T, by which both distributions are flattened; the factor keeps the size of gradients (Hinton et
            al., arXiv 1503.02531).
    """
    return cast("Tensor", cast("Any", _Divergence).apply(got, wanted, temperature))


class _TokenLoss(torch.autograd.Function):
    """Keeps the loss's gradient in the logits' format instead of several float32 tensors of their size."""

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
        losses, kept = _begun(ctx, logits)
        for part in _parts(logits):
            log_q, target = torch.log_softmax(_wide(logits[part]), dim=-1), targets[part, None]
            losses[part] = -log_q.gather(-1, target)[:, 0]
            if kept is not None:
                kept[part] = log_q.exp_().scatter_add_(-1, target, log_q.new_full(target.shape, -1.0))
        return losses


class _Divergence(_TokenLoss):
    @staticmethod
    def forward(ctx: Any, got: Tensor, wanted: Tensor, temperature: float) -> Tensor:
        losses, kept = _begun(ctx, got)
        for part in _parts(got):
            log_p, log_q = (torch.log_softmax(_wide(x[part]) / temperature, dim=-1) for x in (wanted, got))
            p = log_p.exp()
            losses[part] = temperature**2 * (p * log_p.sub_(log_q)).sum(-1)
            if kept is not None:
                kept[part] = log_q.exp_().sub_(p).mul_(temperature)
        return losses


def _begun(ctx: Any, logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """Room for the losses, and for the gradient where it is wanted."""
    kept = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
    if kept is not None:
        ctx.save_for_backward(kept)
    return torch.empty_like(logits[:, 0], dtype=_wide(logits[:0]).dtype), kept


def _parts(logits: Tensor) -> Iterator[slice]:
    size = _CPU_CHUNK if logits.device.type == "cpu" else _CHUNK
    return (slice(start, start + size) for start in range(0, logits.shape[0], size))


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


_MEASURED_AT_ONCE = 64  # targets whose distributions over the vocabulary are held in float32 at once


class Outcome(NamedTuple):
    """What a run says of every example of a batch, in nats per response token.

    ``divergence`` is None where it was not asked for.
    """

    log_likelihood: Float[Tensor, " batch"]
    divergence: Float[Tensor, " batch"] | None


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
    r"""Both outcomes of a run from one pass over its logits, in float32, a few targets at a time.

    The divergence is $\frac{1}{|r|} \sum_t KL(p_{dense}(\cdot_t) \| p(\cdot_t))$ over the positions that predict the
    response: unlike the likelihood it cannot gain by fitting the task instead of the dense model.

    Args:
        logits: at the batch's targets, in row-major order.
        dense_logits: the dense model's logits; the divergence is left out where they are not given.
        dense_row: which row of ``dense_logits`` belongs to each target, if not its own.
    """
    if dense_logits is None:
        return Outcome(response_log_likelihood(logits, batch), None)
    targets = batch.targets().to(logits.device)
    dense_row = torch.arange(len(targets), device=logits.device) if dense_row is None else dense_row
    likelihood, divergence = (logits.new_empty(len(targets), dtype=torch.float32) for _ in range(2))
    for start in range(0, len(targets), _MEASURED_AT_ONCE):
        part = slice(start, start + _MEASURED_AT_ONCE)
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


def logits_where(
    model: PreTrainedModel, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "target vocab"]:
    """A plain model's logits at chosen positions, in row-major order; no others reach the unembedding."""
    unembedding = model.get_output_embeddings()
    handle = unembedding.register_forward_pre_hook(lambda module, inputs: (inputs[0][mask][None],))
    try:
        logits: Tensor = model(tokens, use_cache=False).logits[0]
    finally:
        handle.remove()
    return logits


def sequence_loss(
    model: PreTrainedModel, sequences: Sequence[TokenSequence], *, batch_tokens: int | None = None
) -> dict[str, float]:
    """Token-weighted loss of a plain model over the counted tokens of sequences.

    Returns:
        ``loss`` in nats per token, ``perplexity``, ``tokens`` (counted) and ``sequences``.
    """
    total, count = 0.0, 0
    grouped = batches(sequences, max_tokens=batch_tokens or tokens_per_pass(model.device))
    with torch.inference_mode():
        for batch in track(grouped, len(grouped), "loss"):
            nll = _batch_nll(model, batch)
            total += float(nll.double().sum())
            count += len(nll)
    return {"loss": total / count, "perplexity": perplexity(total, count), "tokens": count, "sequences": len(sequences)}


def _batch_nll(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Loss of every counted token; only their positions reach the unembedding."""
    device = model.device
    logits = logits_where(model, batch.tokens.to(device), batch.is_target().to(device))
    return token_nll(logits, batch.targets().to(device))
