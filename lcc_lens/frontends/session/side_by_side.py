"""Generations of the dense, the pruned and restored models, side by side."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lcc_lens.analysis.lens.prompt import Applicable, prompt_tokens
from lcc_lens.core.errors import RequestError
from lcc_lens.models.hooked.fused_attention import fused_attention
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.kv_cache import can_continue
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.hooked.weights import plain_model
from lcc_lens.models.pair import Pair


def generate(
    pair: Pair,
    restorations: Mapping[str, Applicable | None],
    prompt: str,
    max_new_tokens: int = 40,
    *,
    cache: dict[str, str] | None = None,
) -> dict[str, str]:
    """Greedy continuations of ``dense``, ``pruned`` and every restoration, where None stands for the pruned model.

    ``cache`` holds those of the dense and the pruned model: missing ones are computed and stored there.
    """
    if max_new_tokens < 1:
        raise RequestError(f"expected at least 1 new token, got {max_new_tokens}")
    tokens = prompt_tokens(pair, prompt)[None]

    def continuation(model: HookedModel) -> str:
        plain, ids = plain_model(model), tokens.to(device_of(model))
        with fused_attention(model), torch.inference_mode():
            whole = plain.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
                pad_token_id=pair.tokenizer.eos_token_id, use_cache=can_continue(model),
            )  # fmt: skip
        return str(pair.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True))

    results = {} if cache is None else cache
    for name, model in (("dense", pair.dense), ("pruned", pair.pruned)):
        if name not in results:
            results[name] = continuation(model)
    restored = {}
    for name, restoration in restorations.items():
        if restoration is None:
            restored[name] = results["pruned"]
            continue
        with restoration.applied_to(pair.pruned) as changed:
            restored[name] = continuation(changed)
    return {**results, **restored}
