"""Likelihoods of answers for lm-eval: logits where an answer stands and nowhere else, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from lm_eval.models import huggingface
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from lcc_lens.sequences import Batch, TokenSequence, batches

#: A request of lm-eval: its texts, the context's tokens and the answer's.
Request = tuple[tuple[str, str], list[int], list[int]]
#: Positions whose logits are taken to float32 at once.
_POSITIONS = 64


class AnswerScorer(HFLM):  # type: ignore[misc]  # lm-eval is not typed
    """lm-eval's model of transformers, faster and more exact in coarse formats.

    lm-eval computes a distribution over the vocabulary at every position of every request, in the model's format. Here
    it is computed at the answers' positions alone, its logarithms are float32, and answers of one token after the same
    context share a pass. Prompts, tokens, truncation and scoring are lm-eval's own.

    Args:
        model: a causal model; hooks on it act.
        tokenizer: its tokenizer.
        max_length: tokens per request at most; more are cut from the left.
        max_tokens: padded tokens per forward pass.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_length: int, max_tokens: int = 1024) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, max_length=max_length, batch_size=1)
        self._max_tokens = max_tokens

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of every request's answer in nats, and whether each of its tokens is the likeliest."""
        sharing: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for index, (_, context, answer) in enumerate(requests):
            read = tuple((context + answer)[-(self.max_length + 1) : -1])
            sharing.setdefault((read, len(answer)), []).append(index)
        sequences = [TokenSequence(torch.tensor(read), len(read) - n + 1) for read, n in sharing]
        members = list(sharing.values())
        found: dict[int, tuple[float, bool]] = {}
        bar = huggingface.tqdm(total=len(requests), disable=disable_tqdm)
        for batch in batches(sequences, max_tokens=self._max_tokens):
            for row, logits in zip(batch.index, self._answer_logits(batch), strict=True):
                for index in members[row]:
                    text, _, answer = requests[index]
                    found[index] = _scored(logits, answer)
                    self.cache_hook.add_partial("loglikelihood", text, found[index])
                bar.update(len(members[row]))
        bar.close()
        return [found[index] for index in range(len(requests))]

    def _answer_logits(self, batch: Batch) -> Iterator[Float[Tensor, "answer vocab"]]:
        """The logits that predict each row's answer; no others are computed."""
        mask = batch.is_valid() & (torch.arange(batch.tokens.shape[1]) >= batch.loss_from[:, None] - 1)
        logits = _logits_where(self.model, batch.tokens.to(self.device), mask.to(self.device))
        yield from logits.split(mask.sum(1).tolist())


@torch.inference_mode()
def _logits_where(model: Any, tokens: Tensor, mask: Bool[Tensor, "batch pos"]) -> Float[Tensor, "target vocab"]:
    unembedding = model.get_output_embeddings()
    handle = unembedding.register_forward_pre_hook(lambda module, inputs: (inputs[0][mask][None],))
    try:
        logits: Tensor = model(tokens, use_cache=False).logits[0]
    finally:
        handle.remove()
    return logits


def _scored(logits: Float[Tensor, "answer vocab"], answer: Sequence[int]) -> tuple[float, bool]:
    total, is_likeliest = 0.0, True
    targets = torch.tensor(answer, device=logits.device)
    for part, target in zip(logits.split(_POSITIONS), targets.split(_POSITIONS), strict=True):
        log_p = part.float().log_softmax(-1)
        total += float(log_p.gather(-1, target[:, None]).sum())
        is_likeliest = is_likeliest and bool((log_p.argmax(-1) == target).all())
    return total, is_likeliest
