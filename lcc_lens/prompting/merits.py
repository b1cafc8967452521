"""The four merits of a prompt: clarity, precision, a concise chain of thought, preservation of the original."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lcc_lens.core.errors import RequestError
from lcc_lens.core.ranges import ranged
from lcc_lens.core.showing import Shown
from lcc_lens.data.batches import TokenSequence, token_ids
from lcc_lens.models.loading.hooked import LoadedModel, load_hooked
from lcc_lens.prompting.likelihoods import token_log_likelihoods
from lcc_lens.prompting.wording import (
    content_words,
    n_words,
    numbers,
    quotations,
    recall,
    sentences,
    words,
)

#: Names of the merits, in the order in which they are shown.
MERITS = ("clarity", "precision", "concise_cot", "preservation")
#: A sentence of more words than this lowers clarity, and so do more tokens per word.
_LONG_SENTENCE, _PIECES = 30, 2.0
#: Added words that use up the merit of a concise chain of thought.
_ADDED_WORDS = 60
#: Shares of the kinds of information in preservation; kinds that the original lacks do not count.
_PRESERVED = {"words": 0.5, "numbers": 0.3, "quotations": 0.2}
_VAGUE = frozenset(
    {"something", "stuff", "thing", "things", "somehow", "somewhat", "maybe", "perhaps", "whatever", "etc", "various"}
    | {"good", "nice", "certain", "kinda", "sorta", "anything", "several"}
)
_CONSTRAINTS = re.compile(
    r"\b(?:at (?:most|least)|no more than|exactly|only|must|between|within|without|instead of|in (?:one|two|three|a "
    r"single)|(?:one|two|three|four|five|six|seven|eight|nine|ten)|list|table|json|csv|bullet|bullets|sentences?|words?|"
    r"paragraphs?|steps?|format|complete|specific|correct|for example|such as)\b",
    re.IGNORECASE,
)
_CUES = re.compile(
    r"step[\s-]by[\s-]step|\bthink\b|\breason(?:ing)? (?:through|about|briefly)"
    r"|\bbriefly (?:explain|plan|outline|reason)"
    r"|\bfirst\b.{1,200}\b(?:then|next|finally)\b|\boutline\b|\bin this order\b|\bsteps? that\b|\bthe (?:key )?steps\b"
    r"|paso a paso|étape par étape|Schritt für Schritt|passo a passo|шаг за шагом|逐步|一步一步|ステップ|단계별로",
    re.IGNORECASE | re.DOTALL,
)
_TRIPLED = re.compile(r"([^\W\d_])\1\1", re.IGNORECASE)
_NO_VOWEL = re.compile(r"[b-df-hj-np-tv-xz]{4,}")


@dataclass(frozen=True, repr=False)
class Merits(Shown):
    """The merits of a prompt, each from 0 to 1, and what lowers them.

    Args:
        clarity: no misspelt or repeated words, no vague words, sentences of ordinary length.
        precision: constraints (numbers, quotations, limits, formats) and the density of content words.
        concise_cot: a short hint at structure or reasoning; every added word takes from it.
        preservation: the original's content words, numbers and quotations that are kept; 1 without an original.
        lowered: by merit, what lowers it.
        prompt_log_likelihood: of the prompt under the model, nats per token; None without a model.
        original_log_likelihood: of the original after the prompt, nats per token; None without a model or original.

    The model's likelihoods stand beside the scores and do not enter them: their scale is each model's own.
    """

    clarity: float
    precision: float
    concise_cot: float
    preservation: float
    lowered: dict[str, tuple[str, ...]] = field(default_factory=dict)
    prompt_log_likelihood: float | None = None
    original_log_likelihood: float | None = None

    @property
    def scores(self) -> dict[str, float]:
        """The four scores by name."""
        return {name: getattr(self, name) for name in MERITS}

    @property
    def reasons(self) -> str:
        """What lowers the merits, in one line."""
        return "; ".join(f"{name}: {', '.join(found)}" for name, found in self.lowered.items() if found)

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            name: f"{score:.2f}" + "".join(f"  {reason}" for reason in self.lowered.get(name, ())[:3])
            for name, score in self.scores.items()
        }
        if self.prompt_log_likelihood is not None:
            facts["prompt, nats per token"] = self.prompt_log_likelihood
        if self.original_log_likelihood is not None:
            facts["original after it, nats per token"] = self.original_log_likelihood
        return facts


@ranged
def merits(text: str, original: str | None = None, model: LoadedModel | str | Path | None = None) -> Merits:
    """Score a prompt by the four merits of MePO.

    The scores are rules, not judgements of a model: clarity is the mean of the fractions of well-spelt words, of
    sentences of ordinary length and of words that are not vague (with a model also of its tokens per word); precision
    is the mean of $1 - 2^{-c}$ over $c$ constraints and of the fraction of content words; a concise chain of thought is
    1 with a cue ("step by step") less a sixtieth for every word added to the original; preservation is the recall of
    content words, numbers and quotations. Cues, vague words and function words are English (cues also of nine other
    languages); the rest holds for any script.

    Args:
        text: the prompt, without a chat template around it.
        original: the prompt that it was rewritten from.
        model: adds likelihoods, and tokens per word to clarity; a reference or a loaded model.

    Raises:
        RequestError: a prompt or an original without a word.

    Example:
        >>> merits("List three rivers.", original="List three rivers.").preservation
        1.0

    Reference:
        Zhu et al., "Rethinking Prompt Optimization" (arXiv 2505.09930), which names the merits and lets a model judge.
    """
    check_prompt(text, original)
    loaded = None if model is None else model if isinstance(model, LoadedModel) else load_hooked(model)
    pieces = None if loaded is None else len(token_ids(loaded.tokenizer, text)) / n_words(text)
    scored = {
        "clarity": _clarity(text, pieces),
        "precision": _precision(text),
        "concise_cot": _concise_cot(text, original),
        "preservation": _preservation(text, original),
    }
    likelihoods = (None, None) if loaded is None else _likelihoods(loaded, text, original)
    scores = {name: score for name, (score, _) in scored.items()}
    lowered = {name: reasons for name, (_, reasons) in scored.items() if reasons}
    return Merits(
        **scores, lowered=lowered, prompt_log_likelihood=likelihoods[0], original_log_likelihood=likelihoods[1]
    )


def check_prompt(text: str, original: str | None = None, loaded: LoadedModel | None = None) -> None:
    """Refuse what cannot be scored: no word, or with a model, more tokens than its context.

    Raises:
        RequestError: see above.
    """
    for name, given in (("a prompt", text), ("an original", original)):
        if given is not None and not n_words(given):
            raise RequestError(f"expected {name} with at least one word, got {given!r}; write some text")
    if loaded is not None:
        _sequences(loaded, text, original)


_Scored = tuple[float, tuple[str, ...]]


def _clarity(text: str, pieces: float | None) -> _Scored:
    said = words(text)
    typos = [word for word in said if _TRIPLED.search(word) or _NO_VOWEL.fullmatch(word)]
    typos += [f"{word} {word}" for word, following in pairwise(said) if word == following and word.isascii()]
    vague = [word for word in said if word in _VAGUE]
    longest = max((n_words(sentence) for sentence in sentences(text)), default=0)
    parts = [
        _falling(len(typos), len(said) / 4),
        _falling(len(vague), len(said) / 4),
        min(1.0, _LONG_SENTENCE / longest) if longest else 1.0,
    ]
    reasons = [f"perhaps misspelt {_some(typos)}"] if typos else []
    reasons += [f"vague {_some(vague)}"] if vague else []
    reasons += [f"a sentence of {longest} words"] if longest > _LONG_SENTENCE else []
    if pieces is not None:
        parts.append(min(1.0, _PIECES / pieces) if pieces else 1.0)
        reasons += [f"{pieces:.1f} tokens per word"] if pieces > _PIECES else []
    return sum(parts) / len(parts), tuple(reasons)


def _precision(text: str) -> _Scored:
    constraints = len(_CONSTRAINTS.findall(text)) + numbers(text).total() + quotations(text).total()
    density = content_words(text).total() / max(len(words(text)), 1)
    reasons = () if constraints else ("no number, quotation, limit or format",)
    return (1 - 0.5**constraints + min(density, 1.0)) / 2, reasons


def _concise_cot(text: str, original: str | None) -> _Scored:
    added = 0 if original is None else max(0, n_words(text) - n_words(original))
    if not _CUES.search(text):
        return 0.0, ("no hint at steps or structure",)
    return _falling(added, _ADDED_WORDS), (f"{added} words added",) if added else ()


def _preservation(text: str, original: str | None) -> _Scored:
    if original is None:
        return 1.0, ()
    kinds = {"words": content_words, "numbers": numbers, "quotations": quotations}
    found = {kind: (read(text), read(original)) for kind, read in kinds.items()}
    shares = {kind: _PRESERVED[kind] for kind, (_, before) in found.items() if before}
    kept = sum(share * recall(*found[kind]) for kind, share in shares.items())
    reasons = [
        f"lost {kind} {_some((found[kind][1] - found[kind][0]).elements())}"
        for kind in shares
        if found[kind][1] - found[kind][0]
    ]
    return (min(1.0, kept / sum(shares.values())) if reasons else 1.0), tuple(reasons)


def _likelihoods(loaded: LoadedModel, text: str, original: str | None) -> tuple[float | None, float | None]:
    """The log-likelihood per token of the prompt, and of the original after it and a blank line."""
    lead, whole = _sequences(loaded, text, original)
    there = [sequence for sequence in (lead, whole) if sequence is not None]
    means = iter(token_log_likelihoods(loaded.model, there, longest=loaded.context))
    first, second = (None if sequence is None else float(next(means).mean()) for sequence in (lead, whole))
    return first, second


def _sequences(
    loaded: LoadedModel, text: str, original: str | None
) -> tuple[TokenSequence | None, TokenSequence | None]:
    """The tokens of the prompt, unless it is a single one, and of the original after it, if there is one."""
    lead = token_ids(loaded.tokenizer, text)
    _require_room(len(lead), loaded.context)
    prompt = TokenSequence(torch.tensor(lead), 1) if len(lead) > 1 else None
    if original is None:
        return prompt, None
    start = token_ids(loaded.tokenizer, f"{text}\n\n")
    whole = [*start, *token_ids(loaded.tokenizer, original)]
    _require_room(len(whole), loaded.context)
    return prompt, TokenSequence(torch.tensor(whole), len(start))


def _require_room(n_tokens: int, context: int) -> None:
    if n_tokens > context:
        raise RequestError(f"expected a prompt of at most {context} tokens, got {n_tokens}; shorten it")


def _falling(count: int, most: int | float) -> float:
    """1 for none, 0 for ``most`` and above."""
    return max(0.0, 1 - count / most) if most else 1.0


def _some(found: Iterable[str], n: int = 3) -> str:
    listed = list(dict.fromkeys(found))
    return ", ".join(listed[:n]) + (f" and {len(listed) - n} more" if len(listed) > n else "")
