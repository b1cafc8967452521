"""Read users' ``.jsonl`` and ``.txt`` files; the fields of the records decide how they read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lcc_lens.core.errors import RequestError
from lcc_lens.core.reading import parse_json, read_text
from lcc_lens.data.negatives import distinct_wrongs
from lcc_lens.data.prompts import Example, Item, Kind, Record, read_alpaca

_Reader = Callable[[Record, str], Item | Example]


def is_data_file(name: str) -> bool:
    """Whether a name of data means one file rather than a registered data set, or several names joined by ``+``."""
    return Path(name).suffix in (".jsonl", ".txt") and ("+" not in name or Path(name).exists())


def read_file(path: Path) -> tuple[Kind, list[tuple[Record, Item | Example]], str]:
    """Read a ``.jsonl`` or ``.txt`` file: its kind, its records with their examples, and its name.

    Raises:
        RequestError: no such file, or a line that cannot be used; names the line.
    """
    if path.suffix == ".txt":
        paragraphs = [p.strip() for p in re.split(r"\n\s*\n", read_text(path))]
        return "text", [({"text": p}, Example("", p, group=p)) for p in paragraphs if p], str(path)
    lines = read_lines(path)
    if not lines:
        return "text", [], str(path)
    fields, kind, read = _file_layout(lines[0][1], path)
    pairs: list[tuple[Record, Item | Example]] = []
    for number, record in lines:
        where = f"line {number} of {path}"
        missing = next((field for field in fields if field not in record), None)
        if missing:
            raise RequestError(
                f"expected the same fields in every line of {path}, got {where} without {missing!r}; add it"
            )
        for field in ({*fields} | record.keys() & {"group"}) - {"wrong"}:
            if not isinstance(record[field], str):
                raise RequestError(f"expected text in {field!r} on {where}, got {record[field]!r}; put it in quotes")
        pairs.append((record, read(record, where)))
    return kind, pairs, str(path)


def read_lines(path: Path) -> list[tuple[int, Record]]:
    """The records of a JSONL file with their line numbers; blank lines are skipped.

    Raises:
        RequestError: a line that is no JSON object; names the line.
    """
    records = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        record = parse_json(line, f"line {number} of {path}", "correct the line")
        if not isinstance(record, dict):
            raise RequestError(
                f"expected an object with fields on line {number} of {path}, got {line[:40]!r}; correct it"
            )
        records.append((number, record))
    return records


def _file_layout(record: Record, path: Path) -> tuple[tuple[str, ...], Kind, _Reader]:
    """The layout of a JSONL file, from the fields of its first record."""
    for layout in _LAYOUTS:
        if {*layout[0]} <= record.keys():
            return layout
    raise RequestError(
        f"expected text, prompt + response, instruction + output, or question + right + wrong in {path}, "
        f"got {', '.join(sorted(record)) or 'an empty record'}; rename the fields"
    )


def _text(record: Record, where: str) -> Example:
    return Example("", record["text"], str(record.get("group", record["text"])))


def _response(record: Record, where: str) -> Example:
    return Example(record["prompt"], record["response"], str(record.get("group", record["prompt"])))


def _instruction(record: Record, where: str) -> Item | Example:
    if not isinstance(record.get("input") or "", str):
        raise RequestError(f"expected text in 'input' on {where}, got {record['input']!r}; put it in quotes")
    example = read_alpaca(record)
    return replace(example, group=str(record.get("group", example.group)))


def _question(record: Record, where: str) -> Item:
    """A question with its right answer and one wrong answer or several."""
    wrongs = [record["wrong"]] if isinstance(record["wrong"], str) else record["wrong"]
    if not isinstance(wrongs, list) or not wrongs or not all(isinstance(wrong, str) for wrong in wrongs):
        raise RequestError(
            f"expected an answer or a list of answers in 'wrong' on {where}, got {record['wrong']!r}; add one"
        )
    for field, text in [("question", record["question"]), ("right", record["right"]), *(("wrong", w) for w in wrongs)]:
        if not text.strip():
            raise RequestError(f"expected some text in {field!r} on {where}, got {text!r}; fill it in or drop the line")
    item = Item(record["question"], record["right"], tuple(wrongs), str(record.get("group", record["question"])))
    if len(distinct_wrongs(item)) < len(wrongs):
        raise RequestError(
            f"expected wrong answers that differ from the right one on {where}, got {item.right!r} for both; "
            "correct or drop the line"
        )
    return item


_LAYOUTS: tuple[tuple[tuple[str, ...], Kind, _Reader], ...] = (
    (("question", "right", "wrong"), "contrastive", _question),
    (("prompt", "response"), "instruction", _response),
    (("instruction", "output"), "instruction", _instruction),
    (("text",), "text", _text),
)
