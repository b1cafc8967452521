"""Cases that run every time, and those that repeat them in another way and run with the slow tests."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import pytest

HAS_TL4 = int(version("transformer-lens").split(".")[0]) >= 4
#: What docs/models.md says that TransformerLens 3 does not do.
NEEDS_TL4 = pytest.mark.skipif(not HAS_TL4, reason="needs TransformerLens 4")


def mostly_slow(cases: Iterable[Any], *fast: Any) -> list[Any]:
    """Cases of a parametrised test, all but the ``fast`` ones marked slow; a tuple is a case of several arguments."""
    cases = list(cases)
    assert all(case in cases for case in fast), fast
    return [
        case if case in fast else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]
