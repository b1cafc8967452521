"""What to try next: the method that recovers most in the committed study."""

from __future__ import annotations

#: Per cent of the lost log-perplexity that methods recover (benchmarks/restorations_wanda50.json).
RECOVERED = {"lcc": 21.5, "best": 66.4}


def better_method(method: str) -> str | None:
    """A sentence on the method that the study puts first; None where it was the one that ran.

    Example:
        >>> better_method("best")
    """
    if method == "best":
        return None
    return (
        f"--method best recovers most in the committed study: {RECOVERED['best']:.0f} % of the lost log-perplexity, "
        f"lcc {RECOVERED['lcc']:.0f} %"
    )
