"""Losses token by token over large vocabularies: a few tokens at a time, with gradients from the same pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Tokens at a time: on a processor what they make stays in its cache; elsewhere few launches count more.
_CPU_CHUNK, _CHUNK = 64, 1024


def token_nll(logits: Float[Tensor, "token vocab"], targets: Int[Tensor, " token"]) -> Float[Tensor, " token"]:
    """Negative log-likelihood of each target in nats, in float32 at least."""
    return cast("Tensor", cast("Any", _NegativeLogLikelihood).apply(logits, targets))


def token_divergence(
    wanted: Float[Tensor, "token vocab"], got: Float[Tensor, "token vocab"], temperature: float = 1.0
) -> Float[Tensor, " token"]:
    r"""$T^2\, KL(p_T \Vert q_T)$ of each token in nats, in float32 at least; gradients flow into ``got`` alone.

    Args:
        wanted: logits of p, the dense model's.
        got: logits of q.
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
