"""Rank versions of a prompt by how likely they make its response."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lcc_lens.core.errors import RequestError
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.prompting.likelihoods import encode_response, token_log_likelihoods
from lcc_lens.prompting.wording import n_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: A difference counts from so many standard errors on.
SURE = 2.0


@dataclass(frozen=True)
class Ranked:
    """A version of a prompt with its response's log-likelihood, and by how much that exceeds the raw prompt's.

    Args:
        prompt: the whole prompt.
        log_likelihood: mean over the response's tokens, nats.
        margin: the mean over tokens of the difference from the raw prompt; ``stderr``: its standard error, infinite for
            a response of one token.
    """

    prompt: str
    log_likelihood: float
    margin: float
    stderr: float

    @property
    def is_better(self) -> bool:
        """Whether it is better than the raw prompt by more than two standard errors."""
        return self.margin > SURE * self.stderr


def rank_prompts(
    model: HookedModel,
    tokenizer: PreTrainedTokenizerBase,
    raw: str,
    versions: Sequence[str],
    response: str,
    *,
    max_length: int = 512,
    response_tokens: int = 128,
) -> list[Ranked]:
    """The raw prompt and its versions, the one under which the response is likeliest first; the raw one wins ties.

    Versions that do not fit within ``max_length`` with the response are left out.

    Raises:
        RequestError: an empty version, an empty response, or a raw prompt that does not fit.
    """
    empty = next((version for version in (raw, *versions) if not n_words(version)), None)
    if empty is not None:
        raise RequestError(f"expected prompts with at least one word, got {empty!r}; leave it out")
    if not response.strip():
        raise RequestError("expected a response with text to rank prompts by, got an empty one; fill it in")
    texts = [raw, *dict.fromkeys(version for version in versions if version != raw)]
    encoded = [encode_response(tokenizer, text, response, max_length, response_tokens) for text in texts]
    if encoded[0] is None:
        raise RequestError(
            f"expected a prompt with its response of up to {max_length} tokens, got a longer one; shorten it"
        )
    fitting = [(text, sequence) for text, sequence in zip(texts, encoded, strict=True) if sequence is not None]
    values = [part.double() for part in token_log_likelihoods(model, [s for _, s in fitting], longest=max_length)]
    ranked = []
    for (text, _), tokens in zip(fitting, values, strict=True):
        n = min(len(tokens), len(values[0]))  # a response may begin with another token after another prompt
        difference = tokens[-n:] - values[0][-n:]
        stderr = float(difference.std() / math.sqrt(n)) if n > 1 else math.inf
        is_raw = text == raw
        ranked.append(Ranked(text, float(tokens.mean()), float(difference.mean()), 0.0 if is_raw else stderr))
    return sorted(ranked, key=lambda found: -found.margin)
