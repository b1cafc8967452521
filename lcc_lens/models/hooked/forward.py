"""Forward passes of hooked models, with fused attention kernels and gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lcc_lens.models.architecture.caches import PAST, cache_name
from lcc_lens.models.hooked.fused_attention import fused_attention
from lcc_lens.models.hooked.hooked_transformer import is_hooked_transformer
from lcc_lens.models.hooked.hooks import HookedModel, NamedHook, kept_hooks, logits_at
from lcc_lens.models.hooked.layer_skipping import is_replaced, replaced_forward
from lcc_lens.models.hooked.weights import plain_model


def forward(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    hooks: list[NamedHook],
    *,
    checkpoint_layers: bool = False,
    **options: Any,
) -> Any:
    """Run forward under hooks; returns what ``run_with_hooks`` returns, with fused attention kernels where possible.

    Args:
        checkpoint_layers: gradient checkpointing (arXiv 1604.06174): keep only each layer's input for the backward pass
            and compute the rest again there; the same gradients for less memory and a third more time.
        **options: go to the model: a mask, positions, ``past_key_values``.
    """
    checkpoint_layers = checkpoint_layers and torch.is_grad_enabled()
    checkpointing = _checkpointed_layers(model, hooks) if checkpoint_layers else nullcontext()
    with fused_attention(model) as is_fused, checkpointing:
        # HookedTransformer fills no cache unless it is given one
        if (is_fused or checkpoint_layers) and not is_hooked_transformer(model):
            options.setdefault("use_cache", PAST in options)
        if PAST in options and not is_hooked_transformer(model):
            options[cache_name(plain_model(model).forward)] = options.pop(PAST)
        return model.run_with_hooks(tokens, fwd_hooks=hooks, **options)


def run_without_logits(
    model: HookedModel, tokens: Int[Tensor, "batch pos"], hooks: list[NamedHook], **options: Any
) -> None:
    """Run forward for the hooks alone; ``options`` go to the model (a mask, positions, a cache)."""
    forward(model, tokens, [*hooks, *logits_at(model, None)], **options)


@contextmanager
def _checkpointed_layers(model: Any, hooks: Sequence[NamedHook]) -> Iterator[None]:
    """Forward passes inside the block store only each layer's input for the backward pass.

    A backward pass runs after the block, when temporary hooks are removed, so it attaches a layer's hooks again while
    it recomputes the layer. Transformers' own setting needs a model in training mode, with dropout.
    """
    with ExitStack() as stack:
        for index, block in enumerate(getattr(model, "blocks", ())):
            if is_replaced(block):  # this layer is skipped
                continue
            in_layer = [hook for hook in hooks if hook[0].startswith(f"blocks.{index}.")]
            again = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False,
                context_fn=partial(_contexts, model, in_layer),
            )  # fmt: skip
            stack.enter_context(replaced_forward(block, again))
        yield


def _contexts(
    model: HookedModel, hooks: list[NamedHook]
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The contexts that a layer runs in: in the forward pass, and in the backward pass."""
    return nullcontext(), _backward_context(model, hooks)


@contextmanager
def _backward_context(model: HookedModel, hooks: list[NamedHook]) -> Iterator[None]:
    with fused_attention(model), kept_hooks(model, hooks) if hooks else nullcontext():
        yield
