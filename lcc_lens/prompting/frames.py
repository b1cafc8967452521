"""The part of a prompt that a user wrote, and the template around it, which a rewrite leaves alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from lcc_lens.core.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Templates by family: what stands before and after the last turn of a user; the first that fits counts.
_FAMILIES = {
    "ChatML, Phi 4": (r"<\|im_start\|>user(?:\n|<\|im_sep\|>)", r"<\|im_end\|>"),
    "Llama 3": (r"<\|start_header_id\|>user<\|end_header_id\|>\n\n", r"<\|eot_id\|>"),
    "Llama 4": (r"<\|header_start\|>user<\|header_end\|>\n\n", r"<\|eot\|>"),
    "Llama 2, with or without a system turn": (r"\[INST\](?: ?<<SYS>>.*?<</SYS>>)?\s*", r"\s*\[/INST\]"),
    "Gemma": (r"<start_of_turn>user\n", r"<end_of_turn>"),
    "Gemma 4": (r"<\|turn>user\n", r"<turn\|>"),
    "Phi 3, Zephyr": (r"<\|user\|>\n?", r"(?:<\|end\|>|</s>)?\s*<\|assistant\|>"),
    "gpt-oss": (r"<\|start\|>user<\|message\|>", r"<\|end\|>"),
    "Granite": (r"<\|start_of_role\|>user<\|end_of_role\|>", r"<\|end_of_text\|>"),
    "Cohere": (r"<\|START_OF_TURN_TOKEN\|><\|USER_TOKEN\|>", r"<\|END_OF_TURN_TOKEN\|>"),
    "DeepSeek": (r"<｜User｜>", r"<｜Assistant｜>"),
    "Vicuna": (r"\bUSER: ", r"\s*\bASSISTANT:"),
    "Falcon": (r"(?<![^\n])User: ", r"\n+(?:Assistant|Falcon):"),
    "Alpaca; an input stays after the instruction": (r"### Instruction:\n", r"\n+### (?:Input|Response):"),
    "tasks of lm-eval; a passage stays before the question": (r"(?<![^\n])Question: ", r"\nAnswer:"),
}
#: What no user writes: tokens that mark the turns of a chat.
_CONTROL = re.compile(r"<\|[^|<>\s]+\|>|<｜[^｜\s]+｜>|<\|turn>|<turn\|>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>")
#: Contents that show where a chat template puts them.
_USER, _SYSTEM, _ANSWER = "§user§", "§system§", "§answer§"
#: By tokenizer, its chat template with the patterns that it gives.
_KNOWN: WeakKeyDictionary[Any, tuple[Any, tuple[re.Pattern[str], ...]]] = WeakKeyDictionary()


class Framed(NamedTuple):
    """A prompt in three parts."""

    before: str
    core: str
    after: str

    def having(self, core: str) -> str:
        """The whole prompt with another core."""
        return f"{self.before}{core}{self.after}"


def split_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Framed:
    r"""Split a prompt into its template and what the user wrote; without a template, blanks around the text.

    Args:
        tokenizer: one whose chat template is tried before those of well-known families.

    Raises:
        RequestError: what the user wrote would hold control tokens, so the template is none of these.

    Example:
        >>> split_prompt("Question: Is iron a metal?\nAnswer:").core
        'Is iron a metal?'
    """
    for template in (*_own(tokenizer), *_TEMPLATES):
        match = template.fullmatch(prompt)
        if match is not None and match["core"].strip():
            framed = Framed(match["before"], match["core"], match["after"])
            break
    else:
        core = prompt.strip()
        start = prompt.find(core)
        framed = Framed(prompt[:start], core, prompt[start + len(core) :])
    control = _CONTROL.search(framed.core)
    if control is not None:
        raise RequestError(
            f"expected a bare prompt or one in a known chat template, got the control token {control[0]!r} in "
            f"{prompt[:40]!r}; name a model that has this template, or leave the prompt out"
        )
    return framed


def _pattern(before: str, after: str) -> re.Pattern[str]:
    return re.compile(rf"(?P<before>{before})(?P<core>.*?)(?P<after>{after})", re.DOTALL)


_TEMPLATES = tuple(_pattern(f".*{before}", f"{after}.*") for before, after in _FAMILIES.values())


def _own(tokenizer: PreTrainedTokenizerBase | None) -> tuple[re.Pattern[str], ...]:
    """The patterns of a tokenizer's chat template."""
    if tokenizer is None or not tokenizer.chat_template:
        return ()
    if tokenizer not in _KNOWN or _KNOWN[tokenizer][0] != tokenizer.chat_template:
        _KNOWN[tokenizer] = tokenizer.chat_template, _patterns(tokenizer)
    return _KNOWN[tokenizer][1]


def _patterns(tokenizer: PreTrainedTokenizerBase) -> tuple[re.Pattern[str], ...]:
    """What stands before and after the last user's text: in a longer chat, after a system's text, in the first turn.

    A system's text that a template sets apart from the user's by blanks alone counts as the user's.
    """
    head, tail = _around(_rendered(tokenizer, "user"))
    first, between = _around(_rendered(tokenizer, "user", "assistant", "user"), _USER, _ANSWER, _USER)[1:3]
    closed = _around(_rendered(tokenizer, "user", is_asked=False))[1]
    end = _shared_start([text for text in (tail, closed, first) if text.strip()]).rstrip() if tail.strip() else ""
    header = _shared_start([head[::-1], (between or head)[::-1]])[::-1]
    header = header.removeprefix(end).lstrip() if end else header
    if not header.strip():
        return ()
    starts = [f".*{re.escape(between)}"] if between.strip() else []
    lead, middle = _around(_rendered(tokenizer, "system", "user"), _SYSTEM, _USER)[:2]
    if middle.strip() and not middle.endswith(header):
        starts.append(f".*{re.escape(header + lead.rpartition(header)[2])}.*?{re.escape(middle)}")
    after = f"{re.escape(end)}.*" if end else r"\s*"
    return tuple(_pattern(start, after) for start in (*starts, f".*?{re.escape(header)}"))


def _shared_start(texts: Sequence[str]) -> str:
    return "".join(letters[0] for letters in takewhile(lambda letters: len({*letters}) == 1, zip(*texts, strict=False)))


def _rendered(tokenizer: PreTrainedTokenizerBase, *roles: str, is_asked: bool = True) -> str:
    """A chat of marked contents, without the special token at its beginning; nothing where a template refuses it."""
    contents = {"user": _USER, "system": _SYSTEM, "assistant": _ANSWER}
    turns = [{"role": role, "content": contents[role]} for role in roles]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=is_asked))
    except Exception:  # templates raise errors of their own
        return ""
    return text.removeprefix(str(tokenizer.bos_token or ""))


def _around(text: str, *marks: str) -> list[str]:
    """The text before, between and after marks in their order; empty parts where one is missing."""
    parts: list[str] = []
    for mark in marks or (_USER,):
        part, found, text = text.partition(mark)
        if not found:
            return [""] * (len(marks or (_USER,)) + 1)
        parts.append(part)
    return [*parts, text]
