"""Families: each goes through the whole method, and the table in the docs says what came of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from support.conformance import DOCS, FAMILIES, conform, document
from support.tiers import mostly_slow

COMMITTED = json.loads((DOCS / "families.json").read_text())


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "gpt2", "gemma2"))
def test_family_is_as_the_table_says(family: str, tmp_path: Path) -> None:
    assert asdict(conform(family, tmp_path)) == COMMITTED["families"][family]


def test_table_is_the_one_of_the_results() -> None:
    assert list(COMMITTED["families"]) == list(FAMILIES)
    assert (DOCS / "families.md").read_text() == document(COMMITTED), "run make families"
