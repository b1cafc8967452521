"""What the dense, the pruned and the restored model make of the same prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lcc_lens.core.errors import RequestError
from lcc_lens.models.hooked.forward import forward, fused_attention
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.hooked.weights import plain_model
from lcc_lens.models.pair import Pair
from lcc_lens.restoration.injections.base import Injection

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")


def on_each(
    pair: Pair, injection: Injection | None, read: Callable[[HookedModel], T], bare: dict[str, T] | None = None
) -> dict[str, T]:
    """What a function of a hooked model gives for ``dense``, ``pruned`` and ``restored``; all models stay as they are.

    Args:
        pair: the hooked models.
        injection: what restores; without one the restored model is the pruned one.
        read: the function.
        bare: where to keep what ``dense`` and ``pruned`` gave; what is there already is not read again.
    """
    found = {} if bare is None else bare
    for name, model in (("dense", pair.dense), ("pruned", pair.pruned)):
        if name not in found:
            found[name] = read(model)
    if injection is None:
        return {**found, "restored": found["pruned"]}
    with injection.applied_to(pair.pruned) as restored:
        return {**found, "restored": read(restored)}


def next_tokens(
    pair: Pair, injection: Injection | None, prompt: str, k: int = 10, *, bare: dict[str, Tensor] | None = None
) -> pd.DataFrame:
    """The probabilities of the next token: the ``k`` most likely of each model, those most likely restored first.

    Returns:
        One row per token, with the columns ``token``, ``dense``, ``pruned`` and ``restored``.

    Raises:
        RequestError: an empty prompt, or fewer than one token asked for.
    """
    import pandas as pd

    if k < 1:
        raise RequestError(f"expected at least 1 token, got k = {k}")
    tokens = _tokens(pair, prompt)
    found = on_each(pair, injection, lambda model: _next_probabilities(model, tokens), bare)
    k = min(k, len(found["dense"]))
    likely = {int(token) for probabilities in found.values() for token in probabilities.topk(k).indices}
    order = sorted(likely, key=lambda token: (-float(found["restored"][token]), token))
    columns = {name: [float(probabilities[token]) for token in order] for name, probabilities in found.items()}
    return pd.DataFrame({"token": [pair.tokenizer.decode([token]) for token in order], **columns})


def generate(
    pair: Pair,
    injection: Injection | None,
    prompt: str,
    max_new_tokens: int = 40,
    *,
    bare: dict[str, str] | None = None,
) -> dict[str, str]:
    """What ``dense``, ``pruned`` and ``restored`` go on with, greedily.

    Raises:
        RequestError: an empty prompt, or fewer than one token asked for.
    """
    if max_new_tokens < 1:
        raise RequestError(f"expected at least 1 new token, got {max_new_tokens}")
    tokens = _tokens(pair, prompt)

    def go_on(model: HookedModel) -> str:
        plain, ids = plain_model(model), tokens.to(device_of(model))
        with fused_attention(model), torch.inference_mode():
            whole = plain.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
                pad_token_id=pair.tokenizer.eos_token_id,
            )  # fmt: skip
        return str(pair.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True))

    return on_each(pair, injection, go_on, bare)


def _next_probabilities(model: HookedModel, tokens: Int[Tensor, "1 pos"]) -> Float[Tensor, " d_vocab"]:
    with torch.inference_mode():
        logits = forward(model, tokens.to(device_of(model)), [])
    return torch.softmax(logits[0, -1].float(), -1).cpu()


def _tokens(pair: Pair, prompt: str) -> Int[Tensor, "1 pos"]:
    ids = pair.tokenizer(prompt)["input_ids"]
    if not ids:
        raise RequestError("expected a prompt with at least one token, got none; write some text")
    return torch.tensor([ids])
