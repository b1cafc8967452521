"""Where things lie in the checkout."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
#: Where the browser tests leave what they saw.
PICTURES = ROOT / "build" / "screenshots"
