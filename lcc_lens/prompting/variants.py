"""Variants of prompts: merits one at a time, verbosity, filler of the same length, and degraded prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lcc_lens.core.errors import RequestError
from lcc_lens.core.ranges import ranged
from lcc_lens.core.registry import nearest
from lcc_lens.data.datasets import Data
from lcc_lens.data.prompts import Example
from lcc_lens.data.registry import data_kind
from lcc_lens.prompting.frames import Framed, split_prompt
from lcc_lens.prompting.wording import content_words, pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RAW, SOFT = "raw", "soft"
#: One sentence per merit, and filler, all of the same number of words.
_CLEAR = "This is one single task, so do exactly what it says here:"
_PRECISE = "Give a complete, correct and specific answer to this and nothing else:"
_STEPS = "Think briefly about the key steps first, and then answer the task:"
_FILLER = "The harbour was quiet and a grey ship lay still that morning."
#: What large models write around a task; six times as many words.
_VERBOSE = (
    "You are a highly knowledgeable and experienced assistant who always provides thoughtful and comprehensive help. "
    "Please read the task below with the greatest care, consider every aspect that could possibly be relevant to it, "
    "keep the needs and expectations of the person who asks in mind at all times, and then write a response that is "
    "well organised, engaging, accurate and easy to follow for absolutely everybody. Here now is the task:"
)
#: Of MePO's degraded prompts: the fraction of content words that stay, and of prompts that keep all their numbers.
_KEPT_WORDS, _KEPT_NUMBERS = 0.29, 0.57


def _before(*sentences: str) -> Callable[[str, str], str]:
    lead = " ".join(sentences)
    return lambda core, group: f"{lead} {core}"


def _degraded(core: str, group: str) -> str:
    """A prompt that has lost most of its content words; a hash of the word and the group decides which."""
    with_numbers = _hash(group) < _KEPT_NUMBERS
    parts = pieces(core)
    content = [i for i, part in enumerate(parts) if content_words(part)]
    order = sorted(content, key=lambda i: _hash(f"{group}|{i}|{parts[i]}"))
    kept = set(order[: max(1, round(_KEPT_WORDS * len(content)))])

    def stays(i: int, part: str) -> bool:
        if any(character.isdigit() for character in part):
            return with_numbers
        return i in kept or not content_words(part)

    return " ".join("".join(part for i, part in enumerate(parts) if stays(i, part)).split()) or core


#: By name, the function from what the user wrote and its group to what the variant says. They come before what the user
#: wrote, so that statements to complete, and the last token of a prompt, stay as they are.
VARIANTS: dict[str, Callable[[str, str], str]] = {
    RAW: lambda core, group: core,
    "clear": _before(_CLEAR),
    "precise": _before(_PRECISE),
    "concise-cot": _before(_STEPS),
    "merits": _before(_CLEAR, _PRECISE, _STEPS),
    "verbose": _before(_VERBOSE),
    "filler": _before(_FILLER),
    "filler-long": _before(*[_FILLER] * 6),
    "degraded": _degraded,
    SOFT: lambda core, group: core,
}


@ranged
def prompt_variants(
    data: Data, names: Sequence[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Data]:
    """Write every prompt of the data in several ways; group, response, wrong answer and role stay.

    ``raw`` is the prompt itself. ``clear``, ``precise`` and ``concise-cot`` add one sentence for one merit, ``merits``
    all three, ``filler`` a sentence of as many words that says nothing (``filler-long`` as many as ``verbose``, the
    instructions of a large model). ``degraded`` keeps 29 % of the content words. ``soft`` is the raw prompt behind
    trained embeddings, which :func:`~lcc_lens.prompting.measuring.prompt_study` adds. A template around what the user
    wrote (a chat's with or without a system turn, Alpaca's, a task's) stays as it is.

    Args:
        data: instructions or questions.
        names: which variants; an example's variants depend on nothing but its own prompt and group.
        tokenizer: one whose chat template may be around the prompts; those of well-known families are found without it.

    Raises:
        RequestError: an unknown name, a name twice, none, text without prompts, or an unknown template.

    Example:
        >>> prompt_variants(data, ["raw", "filler"])["filler"].examples[0].prompt  # doctest: +SKIP
    """
    check_variants(names)
    require_prompts(data)
    framed = [(example, split_prompt(example.prompt, tokenizer)) for example in data.examples]
    return {name: replace(data, examples=tuple(_varied(*parts, name) for parts in framed)) for name in names}


def check_variants(names: Sequence[str]) -> None:
    """Refuse unknown variants, one named twice, or none.

    Raises:
        RequestError: names the variants, and the nearest one.
    """
    if not names or len(set(names)) < len(names):
        raise RequestError(f"expected variants of prompts, each once, got {', '.join(names) or 'none'}; name some")
    unknown = next((name for name in names if name not in VARIANTS), None)
    if unknown is not None:
        raise RequestError(
            f"expected a variant of prompts ({', '.join(VARIANTS)}), got {unknown!r}; {nearest(unknown, VARIANTS)}"
        )


def require_prompts(data: Data | str) -> None:
    """Refuse running text; of a data set or file by its name, before anything is loaded.

    Raises:
        RequestError: names the data.
    """
    name = data if isinstance(data, str) else data.name
    kind = data_kind(data) if isinstance(data, str) else data.kind
    if kind == "text":
        raise RequestError(f"expected prompts with responses, got the running text {name}; name other data")


def _varied(example: Example, framed: Framed, name: str) -> Example:
    return replace(example, prompt=framed.having(VARIANTS[name](framed.core, example.group)))


def _hash(text: str) -> float:
    """A number from 0 to 1 that only the text decides."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
