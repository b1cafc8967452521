"""Names of the built-in selectors, of those that every scan scores, and of the default ones."""

from __future__ import annotations

SELECTORS = ("probe", "interaction", "attribution", "patching", "mse", "kl", "gradient", "own", "random")
#: Scores of every scan, computed from its statistics.
ALWAYS_SCORED = ("mse", "random")
#: How heads are chosen by default: it agrees best with activation patching (benchmarks/selector_study.json).
DEFAULT_SELECTOR = "attribution"
#: What a scan computes by default: one backward pass, and what needs no further pass over the data.
SCORED_BY_DEFAULT = (DEFAULT_SELECTOR, "probe", "interaction")
