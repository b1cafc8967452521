"""Which heads react to a prompt: patch one head's output from the run on one prompt into the run on another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.analysis.selectors.activation_patching import PatchingEffects, patch_heads
from lcc_lens.analysis.selectors.patched_run import PatchedRuns
from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import all_heads
from lcc_lens.data.batches import Batch, TokenSequence, batches, pad
from lcc_lens.models.hooked.forward import run_without_logits
from lcc_lens.models.hooked.hooks import HookedModel, z_readers
from lcc_lens.models.hooked.layer_walk import can_start_at_layers
from lcc_lens.models.hooked.offloading import device_of


def head_reactions(
    model: HookedModel,
    sources: Sequence[TokenSequence],
    targets: Sequence[TokenSequence],
    *,
    batch_tokens: int = 2048,
) -> Float[Tensor, "example layer head"]:
    """The change of each response's log-likelihood when one head's output comes from the run on another prompt.

    Patched are the last token of the prompt and what follows, where both prompts have the same tokens. Patching all
    heads there at once gives the other prompt's logits, since nothing else carries information between positions.

    Args:
        sources: the responses after the prompt whose runs give head outputs.
        targets: the same responses after the prompt whose runs are patched.
        batch_tokens: padded tokens per forward pass at most.

    Returns:
        Nats per response token.

    Raises:
        RequestError: learned absolute positions, other responses, or prompts that end in other tokens.
    """
    require_relative_positions(model)
    for source, target in zip(sources, targets, strict=True):
        if not torch.equal(source.tokens[source.loss_from - 1 :], target.tokens[target.loss_from - 1 :]):
            raise RequestError(
                "expected two prompts with the same last token and response, got others; keep the template's end"
            )
    n_layers, n_heads = int(model.cfg.n_layers), int(model.cfg.n_heads)
    effects = PatchingEffects(torch.full((len(targets), n_layers, n_heads), torch.nan), None)
    may_start = can_start_at_layers(model)

    def prepare(batch: Batch) -> PatchedRuns:
        z = aligned_outputs(model, pad(sources, batch.index), batch)
        return PatchedRuns.over(model, batch, z, "response", may_start=may_start)

    patch_heads(batches(targets, max_tokens=batch_tokens), all_heads(n_layers, n_heads), prepare, effects, batch_tokens)
    return effects.log_likelihood


def aligned_outputs(model: HookedModel, source: Batch, target: Batch) -> list[Float[Tensor, "batch pos head d_head"]]:
    """Head outputs by layer in the run on ``source``, shifted so that responses begin where those of ``target`` do."""
    z: list[Tensor] = []
    readers = z_readers(range(int(model.cfg.n_layers)), lambda layer, outputs: z.append(outputs.clone()))
    with torch.inference_mode():
        run_without_logits(model, source.tokens.to(device_of(model)), readers)
    shift = (source.loss_from - target.loss_from)[:, None]
    position = (torch.arange(target.tokens.shape[1]) + shift).clamp(0, source.tokens.shape[1] - 1)
    row = torch.arange(len(position))[:, None]
    return [outputs[row.to(outputs.device), position.to(outputs.device)] for outputs in z]


def require_relative_positions(model: HookedModel) -> None:
    """Refuse a model whose embeddings depend on the position: its residual stream differs however heads are patched.

    Raises:
        RequestError: learned absolute positions.
    """
    kind = getattr(model.cfg, "positional_embedding_type", None)
    if kind in ("standard", "shortformer") or "pos_embed.hook_out" in model.hook_dict:
        raise RequestError(
            "expected rotary or relative positions to patch heads between prompts, got learned absolute ones; leave "
            "heads out"
        )
