"""Log-likelihoods of responses, token by token, and of the same responses after different prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.core.config import tokens_per_pass
from lcc_lens.core.progress import track
from lcc_lens.data.batches import TokenSequence, batches, encode_pair
from lcc_lens.models.hooked.forward import forward
from lcc_lens.models.hooked.hooks import HookedModel, logits_at
from lcc_lens.models.hooked.losses import token_nll
from lcc_lens.models.hooked.offloading import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_log_likelihoods(
    model: HookedModel, sequences: Sequence[TokenSequence], what: str | None = None, longest: int | None = None
) -> list[Float[Tensor, " token"]]:
    """For every sequence the log-likelihood of each counted token in nats, on the CPU, without gradients.

    Args:
        what: the name of a progress bar; none is shown without it.
        longest: see :func:`~lcc_lens.data.batches.batches`.
    """
    device, result = device_of(model), [torch.empty(0)] * len(sequences)
    grouped = batches(sequences, max_tokens=tokens_per_pass(device), longest=longest)
    with torch.inference_mode():
        for batch in track(grouped, len(grouped), what) if what else grouped:
            logits = forward(model, batch.tokens.to(device), logits_at(model, batch.is_target().to(device)))[0]
            values = -token_nll(logits, batch.targets().to(device)).cpu()
            for index, part in zip(batch.index, values.split(batch.is_target().sum(1).tolist()), strict=True):
                result[index] = part
    return result


def encode_response(
    tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, max_length: int, response_tokens: int
) -> TokenSequence | None:
    """Prompt and response as one sequence with the response's first tokens; None if these do not fit.

    The response is never cut by a longer prompt, so that responses after different prompts can be compared.
    """
    whole = encode_pair(tokenizer, prompt, response, max_length + response_tokens)
    if whole is None or whole.loss_from + min(len(whole) - whole.loss_from, response_tokens) > max_length:
        return None
    return TokenSequence(whole.tokens[: whole.loss_from + response_tokens], whole.loss_from)
