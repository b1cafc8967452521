"""What a scan is asked for: sequences, their length and the selectors, checked before any work."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from lcc_lens.analysis.selectors.linear_probe import MIN_PAIRS
from lcc_lens.analysis.selectors.names import ALWAYS_SCORED, CHEAP, NEED_MODELS, NEED_PAIRS
from lcc_lens.core.errors import RequestError
from lcc_lens.data.batches import TokenSequence, encode_pair
from lcc_lens.data.datasets import ONE_CLASS, Data, encode, one_class
from lcc_lens.models.pair import Pair

logger = logging.getLogger(__name__)

_DEFAULT_LENGTH = 512


def pair_sequences(
    data: Data, pair: Pair, length: int, limit: int | None
) -> tuple[list[TokenSequence], tuple[TokenSequence, ...] | None]:
    """The sequences to scan, with their wrong counterparts where there are any.

    Answers are cut at the limit; pairs of which it leaves nothing to tell apart are left out.
    """
    if any(example.wrong is None for example in data.examples):
        return encode(data, pair.tokenizer, max_length=length, limit=limit), None
    encoded = [
        [encode_pair(pair.tokenizer, e.prompt, str(text), length) for text in (e.response, e.wrong)]
        for e in data.examples[:limit]
    ]
    fitting = [  # answers that the limit cut to the same tokens have nothing to tell apart
        (right, wrong)
        for right, wrong in encoded
        if right is not None and wrong is not None and not torch.equal(right.tokens, wrong.tokens)
    ]
    if len(fitting) < len(encoded):
        logger.warning(
            "%d of %d pairs left out: longer than %d tokens", len(encoded) - len(fitting), len(encoded), length
        )
    if not fitting:
        raise RequestError(
            f"expected contrastive pairs of up to {length} tokens from {data.source}, got none; raise the limit"
        )
    return [right for right, _ in fitting], tuple(wrong for _, wrong in fitting)


def checked_length(pair: Pair, max_length: int | None) -> int:
    """The longest sequence, within the models' context."""
    context = pair.context
    if max_length is not None and max_length > context:
        raise RequestError(
            f"expected sequences within the models' context of {context} tokens, got a limit of {max_length}"
        )
    return max_length if max_length is not None else min(_DEFAULT_LENGTH, context)


def possible_selectors(
    named: Sequence[str] | None, pair: Pair, data: Data, wrong: Sequence[TokenSequence] | None
) -> list[str]:
    """The selectors to compute; what was named and cannot be served is refused before any work."""
    names = [name for name in (CHEAP if named is None else named) if name not in ALWAYS_SCORED]
    reason = None
    label = one_class(data)
    if wrong is None:
        reason = f"expected questions with right and wrong answers, got {data.name} without"
    elif len(wrong) < MIN_PAIRS:
        reason = f"expected at least {MIN_PAIRS} pairs, got {len(wrong)}; scan more examples"
    elif label is not None:
        reason = ONE_CLASS.format(label=label, n=len(data))
    if reason is not None and any(name in NEED_PAIRS for name in names):
        if named is not None:
            raise RequestError(reason)
        if wrong is not None:
            logger.warning("no probe scores: %s", reason)
        names = [name for name in names if name not in NEED_PAIRS]
    if pair.one_at_a_time and any(name in NEED_MODELS for name in names):
        both = ", ".join(name for name in names if name in NEED_MODELS)
        raise RequestError(f"expected both models in memory for {both}, got one at a time; load both")
    return names
