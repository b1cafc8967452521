"""Preferences between prompts, and the JSON files that hold them, MePO's among them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import write_json
from lcc_lens.core.reading import read_json, read_json_lines
from lcc_lens.data.user_files import read_lines
from lcc_lens.prompting.wording import n_words

_ADVICE = "write a JSON list, or lines, of objects with prompt, chosen and rejected"
_LINES, _TEXTS = ".jsonl", ("prompt", "chosen", "rejected")
#: MePO puts the raw prompt into its instruction, before the responses or what to do.
_SILVER = re.compile(
    r"Sliver Prompt:\r?\n'(?P<core>.*?)'(?:\r?\n){2,}(?:Sliver Prompt Response:|The optional)", re.DOTALL
)


@dataclass(frozen=True)
class Preference:
    """A prompt with a better and a worse version of it.

    Args:
        prompt: the raw prompt.
        chosen: the better version; ``rejected``: the worse one; either may be the raw prompt itself.
        margin: by how much the response is likelier after the better one, nats per token; None if not measured.
    """

    prompt: str
    chosen: str
    rejected: str
    margin: float | None = None

    def swapped(self) -> Preference:
        """The same with chosen and rejected exchanged."""
        return Preference(self.prompt, self.rejected, self.chosen, None if self.margin is None else -self.margin)


def read_preferences(path: str | Path) -> list[Preference]:
    """Read objects with ``prompt``, ``chosen`` and ``rejected``: a JSON list, or lines as MePO's repository writes.

    Other fields are passed over. Where ``prompt`` is MePO's whole instruction, the raw prompt within it is taken.

    Raises:
        RequestError: no such file, another layout, an empty list, or an entry that :func:`check_preferences` refuses.
    """
    if Path(path).suffix == _LINES:
        found = read_json_lines(Path(path), Preference, _ADVICE)
    else:
        found = read_json(Path(path), list[Preference], _ADVICE, finite=True)
    if not found:
        raise RequestError(f"expected preferences in {path}, got an empty list; add some")
    found = [replace(preference, prompt=_raw(preference.prompt)) for preference in found]
    check_preferences(found, f" of {path}")
    return found


def check_preferences(preferences: Sequence[Preference], where: str = "") -> None:
    """Refuse what nothing can be learned from.

    Raises:
        RequestError: a text without words, or the same text chosen and rejected; names the entry.
    """
    for number, preference in enumerate(preferences):
        empty = next((name for name in _TEXTS if not n_words(getattr(preference, name))), None)
        if empty:
            raise RequestError(f"expected some text in {empty!r} of entry {number}{where}, got none; fill it in")
        if preference.chosen == preference.rejected:
            raise RequestError(
                f"expected two versions in entry {number}{where}, got {preference.chosen[:40]!r} for both; "
                "correct or drop it"
            )


def is_preference_file(name: str) -> bool:
    """Whether a name means a file of preferences: any ``.json``, and a ``.jsonl`` whose first line is one."""
    path = Path(name)
    if path.suffix != _LINES or not path.is_file():
        return path.suffix == ".json"
    records = read_lines(path)
    return bool(records) and {*_TEXTS} <= records[0][1].keys()


def write_preferences(path: str | Path, preferences: Sequence[Preference]) -> None:
    """Write preferences as :func:`read_preferences` reads them, atomically."""
    write_json(Path(path), [asdict(preference) for preference in preferences])


def _raw(prompt: str) -> str:
    found = _SILVER.search(prompt)
    return found["core"] if found and found["core"].strip() else prompt
