"""The part of a prompt that a user wrote, and the template around it, which a rewrite leaves alone."""

from __future__ import annotations

import re
from typing import NamedTuple

#: Templates, each with the groups ``before``, ``core`` and ``after``; the first that fits counts.
_TEMPLATES = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        # ChatML: the last user turn, with the system turn and earlier turns before it
        r"(?P<before>.*<\|im_start\|>user\n)(?P<core>.*?)(?P<after><\|im_end\|>.*)",
        # Llama 3
        r"(?P<before>.*<\|start_header_id\|>user<\|end_header_id\|>\n\n)(?P<core>.*?)(?P<after><\|eot_id\|>.*)",
        # Llama 2, with or without a system turn
        r"(?P<before>.*\[INST\](?: <<SYS>>.*?<</SYS>>)?\s*)(?P<core>.*?)(?P<after>\s*\[/INST\].*)",
        # Gemma
        r"(?P<before>.*<start_of_turn>user\n)(?P<core>.*?)(?P<after><end_of_turn>.*)",
        # Phi 3 and Zephyr
        r"(?P<before>.*<\|user\|>\n?)(?P<core>.*?)(?P<after>(?:<\|end\|>|</s>)?\s*<\|assistant\|>.*)",
        # Alpaca's; an input stays after the instruction
        r"(?P<before>.*### Instruction:\n)(?P<core>.*?)(?P<after>\n\n### (?:Input|Response):\n.*)",
        # tasks of lm-eval; a passage stays before the question
        r"(?P<before>(?:.*\n)?Question: )(?P<core>[^\n]*)(?P<after>\nAnswer:.*)",
    )
)


class Framed(NamedTuple):
    """A prompt in three parts."""

    before: str
    core: str
    after: str

    def having(self, core: str) -> str:
        """The whole prompt with another core."""
        return f"{self.before}{core}{self.after}"


def split_prompt(prompt: str) -> Framed:
    r"""Split a prompt into its template and what the user wrote; without a template, blanks around the text.

    Example:
        >>> split_prompt("Question: Is iron a metal?\nAnswer:").core
        'Is iron a metal?'
    """
    for template in _TEMPLATES:
        match = template.fullmatch(prompt)
        if match is not None and match["core"].strip():
            return Framed(match["before"], match["core"], match["after"])
    core = prompt.strip()
    start = prompt.find(core)
    return Framed(prompt[:start], core, prompt[start + len(core) :])
