"""Preferences between prompts, and the JSON files of MePO that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import write_json
from lcc_lens.core.reading import convert, parse_json, read_text

_ADVICE = "write a JSON list of objects with prompt, chosen and rejected"
#: MePO puts the raw prompt into its instruction, between these lines.
_SILVER = ("Sliver Prompt:\n'", "'\n\n")


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
    """Read a JSON list of objects with ``prompt``, ``chosen`` and ``rejected``, as the MePO repository trains on.

    Other fields are passed over. Where ``prompt`` is MePO's whole instruction, the raw prompt within it is taken.

    Raises:
        RequestError: no such file, another layout, an empty list, or an empty text; names the entry.
    """
    found = convert(
        parse_json(read_text(Path(path)), str(path), _ADVICE, finite=True), list[Preference], str(path), _ADVICE
    )
    if not found:
        raise RequestError(f"expected preferences in {path}, got an empty list; add some")
    for number, preference in enumerate(found):
        empty = next((name for name in ("prompt", "chosen", "rejected") if not getattr(preference, name).strip()), None)
        if empty:
            raise RequestError(f"expected some text in {empty!r} of entry {number} of {path}, got none; fill it in")
    return [Preference(_raw(p.prompt), p.chosen, p.rejected, p.margin) for p in found]


def write_preferences(path: str | Path, preferences: Sequence[Preference]) -> None:
    """Write preferences as :func:`read_preferences` reads them, atomically."""
    write_json(Path(path), [asdict(preference) for preference in preferences])


def _raw(prompt: str) -> str:
    start, end = _SILVER
    _, found, rest = prompt.partition(start)
    core, closed, _ = rest.partition(end)
    return core if found and closed and core.strip() else prompt
