"""Likelihoods of answers for lm-eval: logits where an answer stands and nowhere else, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from lm_eval.models import huggingface
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from lcc_lens.core.errors import RequestError
from lcc_lens.data.batches import Batch, TokenSequence, batches
from lcc_lens.models.hooked.losses import logits_where, token_nll

#: A request of lm-eval: its texts, the context's tokens and the answer's.
Request = tuple[tuple[str, str], list[int], list[int]]


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
        """Log-likelihood of every request's answer in nats, and whether each of its tokens is the likeliest.

        Raises:
            RequestError: an answer that is longer than the limit by itself.
        """
        longest = max((len(answer) for _, _, answer in requests), default=0)
        if longest > self.max_length:
            raise RequestError(
                f"expected answers of at most {self.max_length} tokens, got one of {longest}; leave the task out"
            )
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
        with torch.inference_mode():
            logits = logits_where(self.model, batch.tokens.to(self.device), mask.to(self.device))
        yield from logits.split(mask.sum(1).tolist())


def _scored(logits: Float[Tensor, "answer vocab"], answer: Sequence[int]) -> tuple[float, bool]:
    targets = torch.tensor(answer, device=logits.device)
    with torch.inference_mode():
        return -float(token_nll(logits, targets).sum()), bool((logits.argmax(-1) == targets).all())
