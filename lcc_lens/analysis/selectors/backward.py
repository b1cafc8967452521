"""One backward pass through the pruned model per batch, shared by both gradient selectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.machine.memory import trim_heap
from lcc_lens.core.progress import track
from lcc_lens.data.batches import Batch, TokenSequence, batches
from lcc_lens.models.hooked.forward import forward
from lcc_lens.models.hooked.hooks import HookFunction, NamedHook, logits_at, z_name, z_readers
from lcc_lens.models.hooked.losses import response_log_likelihood
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.pair import Pair

_N_GROUPS = 10


@dataclass(frozen=True)
class ResponseGradients:
    r"""Gradients of each example's mean response log-likelihood $m_n$ (nats per token) at the pruned model's heads.

    ``attribution`` is, per example, $\sum_t \nabla_{z_t} m_n \cdot (z_{dense,t} - z_{pruned,t})$. The gradient with
    respect to a constant added at every position, $g_n = \sum_t \nabla_{z_t} m_n$, is stored as sums over groups of
    examples (``group_gradient`` $= \sum_n g_n$, ``group_square`` $= \sum_n |g_n|^2$): enough for the norm of its mean
    and that norm's standard error, and the memory does not grow with the number of examples.
    """

    attribution: Float[Tensor, "example layer head"]
    group_gradient: Float[Tensor, "group layer head d_head"]
    group_square: Float[Tensor, "group layer head"]
    group_size: Int[Tensor, " group"]

    @property
    def n_examples(self) -> int:
        """The number of examples."""
        return int(self.attribution.shape[0])


def response_gradients(
    pair: Pair, sequences: Sequence[TokenSequence], *, batch_tokens: int = 1024, n_groups: int = _N_GROUPS
) -> ResponseGradients:
    """Run the dense model forward and the pruned model forward and backward once over the examples.

    Gradients have the models' number format and are summed in float32; the weights need none. Each layer's gradient is
    reduced when the backward pass reaches it, so memory is that of a training step.

    Args:
        sequences: questions with their right answers, whose log-likelihood is differentiated.
        batch_tokens: padded tokens per forward pass at most, half as many with a backward pass; decides memory.
        n_groups: maximum number of groups of examples for the jackknife.

    Raises:
        RequestError: fewer than two examples.
        LensError: a gradient is NaN or infinite (names layer and head).
    """
    if len(sequences) < 2:
        raise RequestError(f"expected at least 2 examples for gradients, got {len(sequences)}; pass more")
    n_groups = min(n_groups, len(sequences))
    shape = pair.n_layers, pair.n_heads
    attribution = torch.zeros(len(sequences), *shape)
    gradient, square = torch.zeros(n_groups, *shape, pair.d_head), torch.zeros(n_groups, *shape)
    grouped = batches(sequences, max_tokens=max(1, batch_tokens // 2))  # a backward pass keeps all layers' activations
    for batch in track(grouped, len(grouped), "head gradients"):
        rows = torch.tensor(batch.index)
        by_layer = _batch_gradients(pair, batch)
        attribution[rows] = torch.stack([attributed for attributed, _ in by_layer], dim=1)
        constant = torch.stack([constant for _, constant in by_layer], dim=1)
        gradient.index_add_(0, rows % n_groups, constant)
        square.index_add_(0, rows % n_groups, constant.square().sum(-1))
        trim_heap()
    sizes = torch.bincount(torch.arange(len(sequences)) % n_groups, minlength=n_groups)
    return ResponseGradients(attribution, gradient, square, sizes)


def dense_run(
    pair: Pair, batch: Batch, *, with_logits: bool = False
) -> tuple[list[Float[Tensor, "batch pos head d_head"]], Float[Tensor, "target d_vocab"] | None]:
    """The dense model's head outputs by layer at all positions, in the order of the pruned model's heads.

    They keep the model's number format and device. With ``with_logits`` also its logits at the targets.
    """
    z_dense: list[Tensor] = []
    device = device_of(pair.dense)
    mask = batch.is_target().to(device) if with_logits else None
    readers = z_readers(range(pair.n_layers), lambda layer, z: z_dense.append(pair.kept_heads(layer, z).clone()))
    with torch.inference_mode():
        hooks = [*readers, *logits_at(pair.dense, mask)]
        logits = forward(pair.dense, batch.tokens.to(device), hooks)
    return z_dense, logits[0] if with_logits else None


def _batch_gradients(pair: Pair, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """By layer, the attribution ``[example head]`` and the constant's gradient ``[example head d_head]``."""
    device = device_of(pair.pruned)
    z_dense = [z.to(device) for z in dense_run(pair, batch)[0]]
    reduced: dict[int, tuple[Tensor, Tensor]] = {}
    hooks = _gradient_readers(z_dense, reduced)
    with torch.enable_grad():
        narrow = logits_at(pair.pruned, batch.is_target().to(device))
        logits = forward(pair.pruned, batch.tokens.to(device), [*hooks, *narrow])
        # Examples of a batch are independent, so the gradient of the sum contains the gradient of each.
        response_log_likelihood(logits[0], batch).sum().backward()
    return [reduced[layer] for layer in range(pair.n_layers)]


def _gradient_readers(z_dense: Sequence[Tensor], reduced: dict[int, tuple[Tensor, Tensor]]) -> list[NamedHook]:
    """Hooks that record head outputs for autograd and, in the backward pass, reduce the gradient into ``reduced``."""

    def reader(layer: int) -> HookFunction:
        def record(z: Tensor, hook: object) -> Tensor:
            # The weights need no gradient, so in the first layer autograd starts here. z must be returned: the model
            # continues with what the hook returns, of which the hook's input may be a view.
            z = z if z.requires_grad else z.detach().requires_grad_()
            z_pruned = z.detach()

            def reduce(gradient: Tensor) -> None:
                reduced[layer] = _reduced(gradient.float(), z_dense[layer].float() - z_pruned.float(), layer)

            z.register_hook(reduce)
            return z

        return record

    return [(z_name(layer), reader(layer)) for layer in range(len(z_dense))]


def _reduced(gradient: Tensor, difference: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    attribution, constant = (gradient * difference).sum((1, 3)), gradient.sum(1)
    for reduced in (attribution[..., None], constant):
        if not bool(torch.isfinite(reduced.sum())):
            bad = (~torch.isfinite(reduced)).any(-1).any(0).nonzero()
            if len(bad):
                raise LensError(
                    f"expected finite gradients, got NaN or infinity at head L{layer}H{int(bad[0])}; check the weights"
                )
    return attribution.cpu(), constant.cpu()
