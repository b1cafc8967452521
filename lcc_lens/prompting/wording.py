"""The words of a prompt: content words, numbers, quotations, and how much of a response a prompt gives away."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from unicodedata import normalize

#: Letters of scripts without blanks between words: kana, Han; Thai, Lao, Burmese, Khmer.
_CHARACTERS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_LETTERS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
#: Signs within words, which are no letters: accents, vowels of Hebrew, Arabic, Thai, and of Indic scripts.
_MARKS = "\u0300-\u036f\u0591-\u05bd\u064b-\u065f\u0670\u0e31\u0e34-\u0e3a\u0e47-\u0e4e" + "".join(
    f"{chr(block)}-{chr(block + 3)}{chr(block + 0x3C)}{chr(block + 0x3E)}-{chr(block + 0x4D)}"
    for block in range(0x0900, 0x0D80, 0x80)
)
#: A kana or Han character is a word of its own, and so is an emoji.
_WORD = re.compile(
    rf"[{_CHARACTERS}\u2600-\u27bf\U0001f300-\U0001faff]"
    rf"|[^\W\d_](?:[^\W\d_]|[{_MARKS}]|['’\-](?=[^\W\d_]))*"
)
#: What may be left out of a text by itself: a letter of a script without blanks, or what stands between blanks.
_PIECE = re.compile(rf"\s+|[{_CHARACTERS}{_LETTERS}][{_MARKS}]*|[^\s{_CHARACTERS}{_LETTERS}]+")
#: Other signs for the apostrophe within a word.
_APOSTROPHES = {ord(sign): "'" for sign in "’ʼ＇"}
_NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*")
_QUOTATION = re.compile(
    r"\"([^\"\n]+)\"|“([^”]+)”|«([^»]+)»|„([^“”]+)[“”]|`([^`\n]+)`|「([^」]+)」|(?<!\w)'([^'\n]+)'(?!\w)"
)
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s*|\n+")
#: Words that carry no information of their own.
_FUNCTION_TEXT = (
    "a an the this that these those and or but nor so if then than as at by for from in into of off on onto over to up "
    "with without within about after before between during under is are was were be been being am do does did done has "
    "have had having will would shall should can could may might must it its it's he she they them their his her we "
    "us our you your i me my mine there here what which who whom whose when where why how not no yes please just "
    "very also too any some each all both such only own same out again more most other"
)
_FUNCTION_WORDS = frozenset(_FUNCTION_TEXT.split())
#: Words of a response whose joint occurrence in a prompt counts as a copy; a shorter response counts whole.
_COPIED_WORDS = 3


def words(text: str) -> list[str]:
    """The words of a text in lower case, accents and apostrophes in one spelling; numbers are none."""
    return [word.casefold() for word in _WORD.findall(_spelled_alike(text))]


def pieces(text: str) -> list[str]:
    """The text in parts that can be left out: what stands between blanks, single letters where a script has none."""
    return _PIECE.findall(text)


def n_words(text: str) -> int:
    """How many words and numbers a text has."""
    return len(_WORD.findall(text)) + len(_NUMBER.findall(text))


def content_words(text: str) -> Counter[str]:
    """The words that are not function words of English, in lower case, with their counts."""
    return Counter(word for word in words(text) if word not in _FUNCTION_WORDS)


def numbers(text: str) -> Counter[str]:
    """The numbers of a text as they are written, with their counts."""
    return Counter(_NUMBER.findall(text))


def quotations(text: str) -> Counter[str]:
    """What stands in quotation marks or backticks, with its counts."""
    return Counter(_spelled_alike(next(filter(None, groups)).strip()) for groups in _QUOTATION.findall(text))


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text."""
    return [part for part in _SENTENCE_END.split(text) if part and part.strip()]


def recall(kept: Counter[str], original: Counter[str]) -> float:
    """The fraction of the original's entries that are kept, counted as often as they occur; 1 for none."""
    return (kept & original).total() / original.total() if original else 1.0


def overlap(prompt: str, response: str) -> float:
    """The fraction of a response's three-word sequences that the prompt contains; of one- or two-word responses, whole.

    Numbers count as words, so that an answer of one number is found.
    """
    said, given = (_spelled(text) for text in (response, prompt))
    n = min(_COPIED_WORDS, len(said))
    if not n:
        return 0.0
    sequences, known = _sequences(said, n), set(_sequences(given, n))
    return sum(sequence in known for sequence in sequences) / len(sequences)


def _spelled(text: str) -> list[str]:
    """Words and numbers in their order, in lower case."""
    text = _spelled_alike(text)
    places = [(m.start(), m.group().casefold()) for pattern in (_WORD, _NUMBER) for m in pattern.finditer(text)]
    return [word for _, word in sorted(places)]


def _spelled_alike(text: str) -> str:
    """Composed accents, and one sign for the apostrophe."""
    return normalize("NFC", text).translate(_APOSTROPHES)


def _sequences(spelled: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(spelled[i : i + n]) for i in range(len(spelled) - n + 1)]
