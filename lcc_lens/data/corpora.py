"""Corpora that need no network: running text out of task data, and Python's own standard library."""

from __future__ import annotations

import functools
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from lcc_lens.data.prompts import Example, Record, read_boolq, read_hellaswag

#: Characters of a piece of a source file at most, so that a draw of pieces reaches many files.
_PIECE = 4_000
#: Folders of the standard library that hold no library code.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}


def read_passage(record: Record) -> Example:
    """The Wikipedia passage of a BoolQ question, in the same group as the question."""
    return Example("", record["passage"], group=read_boolq(record).group)


def unique_passages(records: list[Record]) -> list[Record]:
    """One record of every passage."""
    return list({record["passage"]: record for record in records}.values())


def read_howto(record: Record) -> Example:
    """The beginning of a HellaSwag text with its right ending, in the same group as the task's item."""
    item = read_hellaswag(record)
    return Example("", item.prompt + item.right, group=item.group)


def only_howto(records: list[Record]) -> list[Record]:
    """HellaSwag without its captions of videos."""
    return [record for record in records if not record["source_id"].startswith("activitynet")]


def read_support(record: Record) -> Example:
    """The passage of a textbook that supports a SciQ answer."""
    return Example("", record["support"], group=record["support"])


def unique_supports(records: list[Record]) -> list[Record]:
    """One record of every passage; some questions have none."""
    return list({record["support"]: record for record in records if record["support"].strip()}.values())


@functools.cache
def standard_library() -> tuple[Record, ...]:
    """The running interpreter's standard library in pieces of whole lines, in a fixed mixed order, grouped by file."""
    root = Path(sysconfig.get_path("stdlib"))
    pieces = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if _LEFT_OUT.isdisjoint(name.parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            pieces += [{"file": name.as_posix(), "text": piece} for piece in _pieces(text)]
    return tuple(sorted(pieces, key=lambda piece: hashlib.sha256(piece["text"].encode()).digest()))


def read_piece(record: Record) -> Example:
    """A piece of a source file."""
    return Example("", record["text"], group=record["file"])


def _pieces(text: str) -> Iterator[str]:
    piece = ""
    for line in text.splitlines(keepends=True):
        if piece and len(piece) + len(line) > _PIECE:
            yield piece
            piece = ""
        piece += line
    if piece.strip():
        yield piece
