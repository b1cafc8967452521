"""Generations of the dense, the pruned and restored models, side by side."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from lcc_lens.analysis.lens.prompt import Applicable, prompt_tokens
from lcc_lens.core.errors import RequestError
from lcc_lens.core.ranges import Count, ranged
from lcc_lens.models.hooked.fused_attention import fused_attention
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.kv_cache import can_continue, plain_settings
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.models.hooked.weights import plain_model
from lcc_lens.models.pair import Pair

logger = logging.getLogger(__name__)


@ranged
def generate(
    pair: Pair,
    restorations: Mapping[str, Applicable | None],
    prompt: str,
    max_new_tokens: Count = 40,
    *,
    cache: dict[str, str] | None = None,
) -> dict[str, str]:
    """Greedy continuations of ``dense``, ``pruned`` and every restoration, where None stands for the pruned model.

    They end where the models' context does. ``cache`` holds those of the dense and the pruned model: missing ones are
    computed and stored there.

    Raises:
        RequestError: a prompt that leaves no room for a token.
    """
    tokens = prompt_tokens(pair, prompt)[None]
    n_new = min(max_new_tokens, pair.context - tokens.shape[1])
    if n_new < 1:
        raise RequestError(
            f"expected a prompt of at most {pair.context - 1} tokens to go on from, got {tokens.shape[1]}; shorten it"
        )
    if n_new < max_new_tokens:
        logger.warning("continuations end after %d tokens: the context is %d", n_new, pair.context)

    def continuation(model: HookedModel) -> str:
        plain, ids = plain_model(model), tokens.to(device_of(model))
        with fused_attention(model), plain_settings(plain), torch.inference_mode():
            whole = plain.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new, do_sample=False,
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
