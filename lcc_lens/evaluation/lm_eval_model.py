"""lm-eval's model interface, with logits computed only at the answers' positions and log-likelihoods in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from lm_eval.models import huggingface
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from lcc_lens.core.errors import RequestError
from lcc_lens.data.batches import Batch, TokenSequence, batches, known_ids
from lcc_lens.models.hooked.losses import logits_where, token_nll

#: A request of lm-eval: its texts, the tokens of the context, and the tokens of the answer.
Request = tuple[tuple[str, str], list[int], list[int]]


class AnswerScorer(HFLM):  # type: ignore[misc]  # lm-eval is not typed
    """lm-eval's model class for transformers, made faster, and more exact in 16-bit formats.

    lm-eval computes logits at every position of every request, in the model's format. Here they are computed at the
    answers' positions only, log-likelihoods are float32, and requests that read the same tokens share a pass. Prompts,
    tokens, truncation and scoring are lm-eval's own.

    Args:
        model: a causal model, whose hooks stay active.
        tokenizer: its tokenizer.
        max_length: maximum of tokens per request; longer ones are cut from the left.
        max_tokens: padded tokens per forward pass.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_length: int, max_tokens: int = 1024) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, max_length=max_length, batch_size=1)
        self._max_tokens = max_tokens

    def tok_encode(self, string: str, *arguments: Any, **settings: Any) -> list[int]:
        """The tokens of a text, as lm-eval encodes it; see :func:`~lcc_lens.data.batches.known_ids`."""
        encode = partial(super().tok_encode, string, *arguments, **settings)
        return known_ids(self.tokenizer, encode)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of every request's answer in nats, and whether greedy decoding would give the answer."""
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
        scores: dict[int, tuple[float, bool]] = {}
        bar = huggingface.tqdm(total=len(requests), disable=disable_tqdm)
        for batch in batches(sequences, max_tokens=self._max_tokens):
            for row, logits in zip(batch.index, self._answer_logits(batch), strict=True):
                for index in members[row]:
                    text, _, answer = requests[index]
                    scores[index] = _scored(logits, answer)
                    self.cache_hook.add_partial("loglikelihood", text, scores[index])
                bar.update(len(members[row]))
        bar.close()
        return [scores[index] for index in range(len(requests))]

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
