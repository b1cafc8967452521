"""Text from files, models and other programs, made safe to show: on a terminal, and in a model card's Markdown."""

from __future__ import annotations

import re
import unicodedata

#: What Markdown or HTML would act on.
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~&$])")


def visible(text: str, *, keep: str = "\n") -> str:
    r"""Write characters that would act instead of being shown as escapes such as ``\x1b``.

    These are control characters, invisible and direction marks, unpaired surrogates, and line ends other than ``keep``.

    Example:
        >>> print(visible("a\x1b[31mb\u202e"))
        a\x1b[31mb\u202e
    """
    if text.isprintable():
        return text
    return "".join(char if _is_shown(char) or char in keep else _escaped(char) for char in text)


def markdown(text: object) -> str:
    r"""A text as Markdown that reads as the text, on one line: nothing in it is markup, HTML or a table's edge.

    Example:
        >>> markdown("<b>a|b</b>")
        '\\<b\\>a\\|b\\</b\\>'
    """
    return _MARKUP.sub(r"\\\1", visible(str(text), keep=""))


def code(text: object) -> str:
    """A text as a code span of Markdown, in as many backticks as it takes."""
    shown = visible(str(text), keep="")
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence}{shown}{fence}" if len(fence) == 1 else f"{fence} {shown} {fence}"


def _is_shown(char: str) -> bool:
    return char.isprintable() or unicodedata.category(char) == "Zs"


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
