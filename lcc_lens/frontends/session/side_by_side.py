"""Next-token probabilities and generations of the dense, pruned and restored model, side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lcc_lens.core.errors import RequestError
from lcc_lens.models.hooked.forward import forward
from lcc_lens.models.hooked.fused_attention import fused_attention
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.hooked.weights import plain_model
from lcc_lens.models.pair import Pair
from lcc_lens.restoration.injections.base import Injection

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")


def next_tokens(
    pair: Pair, injection: Injection | None, prompt: str, k: int = 10, *, cache: dict[str, Tensor] | None = None
) -> pd.DataFrame:
    """Next-token probabilities of the ``k`` likeliest tokens of each model, sorted by the restored model.

    ``cache`` holds the outputs of the dense and the pruned model: missing ones are computed and stored there.

    Returns:
        One row per token, with the columns ``token``, ``dense``, ``pruned`` and ``restored``.
    """
    import pandas as pd

    if k < 1:
        raise RequestError(f"expected at least 1 token, got k = {k}")
    tokens = _tokens(pair, prompt)
    outputs = _on_each(pair, injection, lambda model: _next_probabilities(model, tokens), cache)
    k = min(k, len(outputs["dense"]))
    likely = {int(token) for probabilities in outputs.values() for token in probabilities.topk(k).indices}
    order = sorted(likely, key=lambda token: (-float(outputs["restored"][token]), token))
    columns = {name: [float(probabilities[token]) for token in order] for name, probabilities in outputs.items()}
    return pd.DataFrame({"token": [pair.tokenizer.decode([token]) for token in order], **columns})


def generate(
    pair: Pair,
    injection: Injection | None,
    prompt: str,
    max_new_tokens: int = 40,
    *,
    cache: dict[str, str] | None = None,
) -> dict[str, str]:
    """Greedy continuations of ``dense``, ``pruned`` and ``restored``; ``cache`` as in :func:`next_tokens`."""
    if max_new_tokens < 1:
        raise RequestError(f"expected at least 1 new token, got {max_new_tokens}")
    tokens = _tokens(pair, prompt)

    def continuation(model: HookedModel) -> str:
        plain, ids = plain_model(model), tokens.to(device_of(model))
        with fused_attention(model), torch.inference_mode():
            whole = plain.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
                pad_token_id=pair.tokenizer.eos_token_id,
            )  # fmt: skip
        return str(pair.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True))

    return _on_each(pair, injection, continuation, cache)


def _on_each(
    pair: Pair, injection: Injection | None, run: Callable[[HookedModel], T], cache: dict[str, T] | None
) -> dict[str, T]:
    """Results of a function for ``dense``, ``pruned`` and ``restored``; without an injection restored is pruned."""
    results = {} if cache is None else cache
    for name, model in (("dense", pair.dense), ("pruned", pair.pruned)):
        if name not in results:
            results[name] = run(model)
    if injection is None:
        return {**results, "restored": results["pruned"]}
    with injection.applied_to(pair.pruned) as restored:
        return {**results, "restored": run(restored)}


def _next_probabilities(model: HookedModel, tokens: Int[Tensor, "1 pos"]) -> Float[Tensor, " d_vocab"]:
    with torch.inference_mode():
        logits = forward(model, tokens.to(device_of(model)), [])
    return torch.softmax(logits[0, -1].float(), -1).cpu()


def _tokens(pair: Pair, prompt: str) -> Int[Tensor, "1 pos"]:
    ids = pair.tokenizer(prompt)["input_ids"]
    if not ids:
        raise RequestError("expected a prompt with at least one token, got none; write some text")
    return torch.tensor([ids])
