"""Names of the built-in selectors, and what each of them needs."""

from __future__ import annotations

SELECTORS = ("probe", "interaction", "attribution", "patching", "mse", "kl", "gradient", "random")
#: Every scan has these scores: they are computed from its statistics.
ALWAYS_SCORED = ("mse", "random")
#: How heads are chosen by default: it agrees best with activation patching (benchmarks/selector_study.json).
DEFAULT_SELECTOR = "attribution"
#: What a scan computes by default: one backward pass, and what needs no further pass over the data.
SCORED_BY_DEFAULT = (DEFAULT_SELECTOR, "probe", "interaction")
#: Selectors that read right and wrong answers, and selectors that run both models again.
NEED_PAIRS = frozenset({"probe", "interaction", "kl"})
NEED_MODELS = frozenset({"attribution", "gradient", "patching"})
