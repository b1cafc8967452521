"""Every promise of SECURITY.md names the tests that hold it."""

from __future__ import annotations

import re

import pytest
from support.places import ROOT

SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
PROMISES = re.findall(r"^\| (.+?) \| (`tests/.+?) \|$", SECURITY, flags=re.MULTILINE)


@pytest.mark.parametrize(("promise", "held_by"), PROMISES, ids=[promise[:40] for promise, _ in PROMISES])
def test_a_promise_is_held_by_tests(promise: str, held_by: str) -> None:
    for name in re.findall("`(.+?)`", held_by):
        files = sorted((ROOT / name).rglob("test_*.py")) if name.endswith("/") else [ROOT / name]
        assert files, f"{name}: {promise}"
        for file in files:
            assert "def test_" in file.read_text(encoding="utf-8"), file


def test_there_are_promises() -> None:
    assert len(PROMISES) >= 7
