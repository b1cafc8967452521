"""Strategies that damage files: values, types and keys of JSON, headers of safetensors, bytes of anything."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

#: What may stand in a value's place.
WRONG = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        3.5,
        1e308,
        10**400,
        "",
        "x" * 300,
        "\x1b[31m",
        "../..",
        [],
        {},
        [[]],
        [None],
        {"a": None},
        "NaN",
    ]
)
#: Values that no JSON file of ours holds, as text in a value's place.
RAW = st.sampled_from(["NaN", "Infinity", "1e999", '"\\ud800"', "[" * 5000, "7" * 5000, "{", ""])
_HOLE = "<here>"


@st.composite
def damaged_json(draw: st.DrawFn, content: bytes) -> bytes:
    """A JSON file with one value replaced, removed or doubled, or another value altogether."""
    value = json.loads(content)
    places = list(_places(value, ()))
    place = draw(st.sampled_from(places)) if places else ()
    action = draw(st.sampled_from(["replace", "remove", "double", "raw", "whole"]))
    if action == "whole" or not place:
        return json.dumps(draw(WRONG)).encode()
    parent = value
    for key in place[:-1]:
        parent = parent[key]
    if action == "remove":
        del parent[place[-1]]
    elif action == "double" and isinstance(parent, list):
        parent.append(parent[place[-1]])
    elif action == "raw":
        parent[place[-1]] = _HOLE
        return json.dumps(value).replace(json.dumps(_HOLE), draw(RAW)).encode()
    else:
        parent[place[-1]] = draw(WRONG)
    return json.dumps(value).encode()


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """A file that is cut, overwritten or lengthened somewhere."""
    at = draw(st.integers(0, max(len(content) - 1, 0)))
    junk = draw(st.sampled_from([b"", b"\x00", b"\xff\xfe", b"}", b"\n", b"\x00" * 64]))
    action = draw(st.sampled_from(["cut", "write", "insert"]))
    if action == "cut":
        return content[:at]
    return content[:at] + junk + content[at + (len(junk) if action == "write" else 0) :]


@st.composite
def damaged_header(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file with a damaged header, of the length that the file says or not."""
    length = int.from_bytes(content[:8], "little")
    header = draw(damaged_json(content[8 : 8 + length]))
    claimed = draw(st.sampled_from([len(header), len(header), length, 0, 2**40]))
    return claimed.to_bytes(8, "little") + header + content[8 + length :]


def damaged(name: str, content: bytes) -> st.SearchStrategy[bytes]:
    """Damage that fits a file's kind."""
    if name.endswith(".json"):
        return damaged_json(content) | damaged_bytes(content)
    if name.endswith(".safetensors"):
        return damaged_header(content) | damaged_bytes(content)
    return damaged_bytes(content)


def _places(value: Any, here: tuple[Any, ...]) -> Any:
    """The path of every value within a JSON value, of long lists and objects the first few."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items)[:12]:
        yield (*here, key)
        yield from _places(item, (*here, key))
