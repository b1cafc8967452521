"""Hard wrong answers: the most similar ones, by sentence embeddings where an encoder is at hand, else by TF-IDF."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lcc_lens.core.progress import track
from lcc_lens.data.prompts import Example, Item
from lcc_lens.data.sentence_encoder import embed_texts, local_embedder

TFIDF = "most similar by tf-idf"
#: Similarities held at once, 20 MB: all of 52,000 answers against each other would take 20 GB.
_CHUNK = 1_000_000


def contrast(items: Sequence[Item], *, single: str = "flipped label") -> tuple[list[Example], str]:
    """Choose for every item the wrong answer that is most similar to the right one.

    Wrong answers equal to the right one (see :func:`normalised`) are passed over. TF-IDF weighs words over the answers
    of all the items given, so a choice between several may depend on which items were drawn.

    Args:
        items: questions with at least one wrong answer that differs from the right one.
        single: what to call the choice where no item offers more than one wrong answer.

    Returns:
        The pairs, and how their wrong answers were chosen.
    """
    wrongs = [distinct_wrongs(item) for item in items]
    if all(len(item.wrongs) == 1 for item in items):
        chosen, how = [0] * len(items), single
    else:
        texts = list(dict.fromkeys(text for item in items for text in (item.right, *item.wrongs)))
        row = {text: number for number, text in enumerate(texts)}
        vectors, how = _vectors(texts)
        owners = [row[item.right] for item, options in zip(items, wrongs, strict=True) for _ in options]
        similarity = _row_products(vectors, owners, [row[text] for options in wrongs for text in options])
        borders = np.cumsum([len(options) for options in wrongs])[:-1]
        chosen = [int(part.argmax()) for part in np.split(similarity, borders)]
    pairs = zip(items, wrongs, chosen, strict=True)
    return [Example(item.prompt, item.right, item.group, options[index]) for item, options, index in pairs], how


def with_other_answers(examples: Sequence[Example]) -> tuple[list[Example], str | None]:
    """Give instructions a wrong response each: the most similar response to another of these instructions.

    Equal responses (see :func:`normalised`) and empty ones are never chosen. Without two different responses there
    is nothing to choose: the examples stay as they are, and None is returned beside them.
    """
    keys = [normalised(example.response) for example in examples]
    first: dict[str, int] = {}
    for number, key in enumerate(keys):
        first.setdefault(key, number)
    texts = [key for key in first if key]
    if len(texts) < 2:
        return list(examples), None
    answers = [examples[first[text]].response for text in texts]
    vectors, how = _vectors(answers)
    other = dict(zip(texts, (answers[index] for index in _nearest_others(vectors)), strict=True))
    # An empty response resembles none: the first will do
    return [replace(e, wrong=other.get(key, answers[0])) for e, key in zip(examples, keys, strict=True)], how


def distinct_wrongs(item: Item) -> list[str]:
    """The wrong answers that differ from the right one in more than case and blanks."""
    return [wrong for wrong in item.wrongs if normalised(wrong) != normalised(item.right)]


def normalised(text: str) -> str:
    """A text in lower case with single blanks: what two answers are compared by."""
    return " ".join(text.lower().split())


def _vectors(texts: Sequence[str]) -> tuple[Any, str]:
    """Unit rows, sparse (words) or dense (embeddings), and what to call the similarity they give."""
    embedder = local_embedder()
    if embedder is not None:
        how = f"most similar by embeddings of {embedder.name} (sha256 {embedder.sha256[:12]})"
        return embed_texts(texts, embedder).numpy(), how
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b")
    vectorizer.fit([*texts, "empty"])  # one word at least: answers may be all digits and signs
    return vectorizer.transform(texts), TFIDF


def _row_products(vectors: Any, left: Sequence[int], right: Sequence[int]) -> np.ndarray:
    """The products of chosen pairs of rows, some at a time."""
    step = max(1, _CHUNK // 512)
    parts = []
    for start in range(0, len(left), step):
        a, b = vectors[left[start : start + step]], vectors[right[start : start + step]]
        products = a.multiply(b) if hasattr(a, "multiply") else a * b
        parts.append(np.asarray(products.sum(axis=1)).ravel())
    return np.concatenate(parts)


def _nearest_others(vectors: Any) -> list[int]:
    """For every row the index of the other row with the largest product (the first of equals), some rows at a time."""
    n_rows = int(vectors.shape[0])
    step = max(1, _CHUNK // n_rows)
    transposed = vectors.T.tocsr() if hasattr(vectors, "tocsr") else vectors.T
    chosen: list[int] = []
    for start in track(range(0, n_rows, step), -(-n_rows // step), "compare answers"):
        products = vectors[start : start + step] @ transposed
        similarity = products.toarray() if hasattr(products, "toarray") else products
        own = np.arange(len(similarity))
        similarity[own, start + own] = -np.inf
        chosen += similarity.argmax(axis=1).tolist()
    return chosen
