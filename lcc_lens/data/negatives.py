"""Choose the wrong answers most similar to the right ones, by sentence embeddings or else TF-IDF."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lcc_lens.core.progress import track
from lcc_lens.data.prompts import Example, Item
from lcc_lens.data.sentence_encoder import embed_texts, local_embedder

TFIDF = "most similar by tf-idf"
#: Similarities in memory at once (20 MB); all pairs of 52,000 answers would take 20 GB.
_CHUNK = 1_000_000


def contrast(items: Sequence[Item], *, single: str = "flipped label") -> tuple[list[Example], str]:
    """Choose for every item the wrong answer that is most similar to the right one.

    Wrong answers equal to the right one (see :func:`normalised`) are skipped. TF-IDF weighs words over the answers of
    all items, so a choice between several may depend on which items were drawn.

    Args:
        items: questions with at least one wrong answer that differs from the right one.
        single: what to call the choice if no item has more than one wrong answer.

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
    """Give each instruction a wrong response: the most similar response to another of the instructions.

    Equal responses (see :func:`normalised`) and empty ones are never chosen.

    Returns:
        The examples, and how their wrong responses were chosen. With fewer than two different responses there is
        nothing to choose from: the examples as they are, and None.
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
    # an empty response is similar to none: take the first
    return [replace(e, wrong=other.get(key, answers[0])) for e, key in zip(examples, keys, strict=True)], how


def distinct_wrongs(item: Item) -> list[str]:
    """The wrong answers that differ from the right one in more than case and blanks."""
    return [wrong for wrong in item.wrongs if normalised(wrong) != normalised(item.right)]


def normalised(text: str) -> str:
    """A text in lower case with single blanks, for comparing two answers."""
    return " ".join(text.lower().split())


def _vectors(texts: Sequence[str]) -> tuple[Any, str]:
    """Unit vectors as rows, sparse (TF-IDF) or dense (embeddings), and the name of the similarity."""
    embedder = local_embedder()
    if embedder is not None:
        how = f"most similar by embeddings of {embedder.name} (sha256 {embedder.sha256[:12]})"
        return embed_texts(texts, embedder).numpy(), how
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b")
    vectorizer.fit([*texts, "empty"])  # needs at least one word, and answers may have none
    return vectorizer.transform(texts), TFIDF


def _row_products(vectors: Any, left: Sequence[int], right: Sequence[int]) -> np.ndarray:
    """The dot product of each pair of rows, a chunk of pairs at a time."""
    step = max(1, _CHUNK // 512)
    parts = []
    for start in range(0, len(left), step):
        a, b = vectors[left[start : start + step]], vectors[right[start : start + step]]
        products = a.multiply(b) if hasattr(a, "multiply") else a * b
        parts.append(np.asarray(products.sum(axis=1)).ravel())
    return np.concatenate(parts)


def _nearest_others(vectors: Any) -> list[int]:
    """For each row the index of the most similar other row (the first of equals), a chunk of rows at a time."""
    n_rows = int(vectors.shape[0])
    step = max(1, _CHUNK // n_rows)
    transposed = vectors.T.tocsr() if hasattr(vectors, "tocsr") else vectors.T
    chosen: list[int] = []
    for start in track(range(0, n_rows, step), -(-n_rows // step), "compare answers"):
        products = vectors[start : start + step] @ transposed
        similarity = products.toarray() if hasattr(products, "toarray") else products
        rows = np.arange(len(similarity))
        similarity[rows, start + rows] = -np.inf
        chosen += similarity.argmax(axis=1).tolist()
    return chosen
