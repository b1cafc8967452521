"""Typed reading of JSON: what has another layout or was changed is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast, overload

import msgspec

from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import write_json
from lcc_lens.core.fingerprint import fingerprint

T = TypeVar("T")
#: A dataclass, or a type such as ``dict[str, int]``, which only calls as a class does.
Kind = Callable[..., T]
#: The field of a record that holds the hash of all others.
CONTENT_HASH = "content_sha256"
_REBUILD = "restore or rebuild the file"
#: Of msgspec's messages in ours.
_WORDS = {
    "Expected": "expected", "Object missing required field": "no field", "Invalid enum value": "unknown word",
    "array": "list",
}  # fmt: skip


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        RequestError: no file, one that may not be read, or other bytes.
    """
    try:
        if path.exists() and not path.is_file():
            raise RequestError(f"expected the file {path}, got a folder or a device; check the path")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise RequestError(f"expected the file {path}, got nothing there; check the path") from error
    except OSError as error:
        raise RequestError(f"expected the file {path}, got none that can be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RequestError(
            f"expected UTF-8 text in {path}, got other bytes ({error.reason}); save it as UTF-8"
        ) from error


def parse_json(text: str, where: str, advice: str = _REBUILD, *, finite: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        finite: refuse NaN and infinity, which are no JSON but which other programs write.

    Raises:
        RequestError: no JSON, or JSON that cannot be kept: nested too deeply, a number of thousands of digits, half of
            a surrogate pair.
    """
    try:
        value = json.loads(text)
        if finite or "\\u" in text:
            json.dumps(value, ensure_ascii=False, allow_nan=not finite).encode()  # half a surrogate pair has no UTF-8
    except json.JSONDecodeError as error:
        raise RequestError(f"expected JSON in {where}, got something else ({error}); {advice}") from error
    except RecursionError as error:
        raise RequestError(f"expected JSON in {where}, got one that is nested too deeply; {advice}") from error
    except UnicodeEncodeError as error:
        raise RequestError(f"expected text in {where}, got half of a surrogate pair; {advice}") from error
    except ValueError as error:
        raise RequestError(f"expected finite numbers of usual length in {where}, got another; {advice}") from error
    return value


def convert(value: Any, kind: Kind[T], where: str, advice: str = _REBUILD, *, closed: bool = False) -> T:
    """A JSON value as a dataclass or another type; fields that the type lacks are passed over.

    Args:
        kind: a dataclass, or a type such as ``dict[str, list[int]]``; lists become tuples where it says so.
        where: what the value is read from, for the message.
        closed: refuse fields that the type lacks.

    Raises:
        RequestError: names the first place that does not fit.
    """
    try:
        read: T = msgspec.convert(value, cast("type[T]", kind), str_keys=True)
    except (msgspec.ValidationError, RecursionError) as error:
        raise RequestError(
            f"expected {where} as lcc-lens reads it, got another layout ({_sentence(error)}); {advice}"
        ) from error
    if closed and (unknown := _unknown_field(value, msgspec.to_builtins(read))):
        raise RequestError(f"expected the fields of {where} alone, got {unknown!r} too; correct the name")
    return read


@overload
def read_json(path: Path, *, advice: str = ...) -> Any: ...
@overload
def read_json(path: Path, kind: Kind[T], advice: str = ..., *, closed: bool = ..., finite: bool = ...) -> T: ...
def read_json(
    path: Path, kind: Any = object, advice: str = _REBUILD, *, closed: bool = False, finite: bool = False
) -> Any:
    """Read a JSON file as a type; see :func:`convert` and :func:`parse_json`."""
    value = parse_json(read_text(path), str(path), advice, finite=finite)
    return convert(value, kind, str(path), advice, closed=closed)


def read_json_lines(path: Path, kind: Kind[T], advice: str = _REBUILD, *, torn: bool = False) -> list[T]:
    """The lines of a log as a type.

    Args:
        torn: pass over a last line that was not written to its end.
    """
    lines = read_text(path).split("\n")
    parsed = ((f"line {n} of {path}", line) for n, line in enumerate(lines[:-1] if torn else lines, 1) if line)
    return [convert(parse_json(line, where, advice, finite=True), kind, where, advice) for where, line in parsed]


def write_record(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with the hash of its content, atomically."""
    write_json(path, {**value, CONTENT_HASH: _content_hash(value)})


def read_record(path: Path, kind: Kind[T], advice: str = _REBUILD) -> T:
    """Read what :func:`write_record` wrote; a record without a hash, as version 0.1.0 wrote it, is read too.

    Raises:
        RequestError: another layout, or a changed record.
    """
    fields = convert(parse_json(read_text(path), str(path), advice, finite=True), dict[str, Any], str(path), advice)
    expected = fields.pop(CONTENT_HASH, None)
    if expected is not None and expected != _content_hash(fields):
        raise RequestError(
            f"expected {path} as it was written, got a changed file; {advice}, or remove "
            f"{CONTENT_HASH!r} from it if the change is meant"
        )
    return convert(fields, kind, str(path), advice)


@contextmanager
def reading(where: str | Path, advice: str = _REBUILD) -> Iterator[None]:
    """Report what a file of another layout raises inside the block in one line."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise RequestError(
            f"expected {where} as lcc-lens reads it, got another layout ({error!r}); {advice}"
        ) from error


def _content_hash(value: Mapping[str, Any]) -> str:
    return fingerprint(json.loads(json.dumps(value)))  # as it is read back


def _sentence(error: Exception) -> str:
    """msgspec's message in our words: ``expected int, got str at tokens[3].text``."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    message, _, place = str(error).replace("`", "").partition(" - at ")
    place = place.removeprefix("$").removeprefix(".")
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    return message + (f" at {place}" if place else "")


def _unknown_field(given: Any, known: Any) -> str | None:
    """The first field of nested JSON objects that was passed over."""
    if isinstance(given, Mapping) and isinstance(known, Mapping):
        return next((key for key in given if key not in known), None) or next(
            (field for key in given if (field := _unknown_field(given[key], known[key]))), None
        )
    if isinstance(given, list) and isinstance(known, list):
        return next((field for pair in zip(given, known, strict=True) if (field := _unknown_field(*pair))), None)
    return None
