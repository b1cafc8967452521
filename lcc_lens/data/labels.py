"""Right and wrong answers: encode them in pairs, and recognise tasks of which only one label is ever right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lcc_lens.data.batches import TokenSequence, encode_pair
from lcc_lens.data.datasets import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Error message for data with one label only (see :func:`one_class`); takes ``label`` and ``n``.
ONE_CLASS = "expected questions of both labels, got only {label!r} in {n}; add questions with the other answer"
#: Fewer examples than this may have one label by chance.
_MIN_LABELLED = 4


def one_class(data: Data) -> str | None:
    """The label that is right in every example of a two-label task; None for any other data.

    A task has two labels if the right and wrong answers of at least four examples are the same two strings. If one of
    them is always right, a probe needs only to read the answer: refuse such data with :data:`ONE_CLASS`.
    """
    rights = {example.response for example in data.examples}
    wrongs = {example.wrong for example in data.examples}
    is_label_task = len(data) >= _MIN_LABELLED and None not in wrongs and len(rights | wrongs) == 2
    return next(iter(rights)) if is_label_task and len(rights) == 1 else None


def encode_answers(
    data: Data, tokenizer: PreTrainedTokenizerBase, max_length: int, limit: int | None = None
) -> list[tuple[TokenSequence, TokenSequence] | None]:
    """The right and the wrong answer of every example, each with its question; None if one is cut off or missing."""
    pairs: list[tuple[TokenSequence, TokenSequence] | None] = []
    for example in data.examples[:limit]:
        texts = (example.response, example.wrong or "")
        right, wrong = (encode_pair(tokenizer, example.prompt, text, max_length) for text in texts)
        pairs.append(None if right is None or wrong is None else (right, wrong))
    return pairs
