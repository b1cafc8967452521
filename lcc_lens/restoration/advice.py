"""What to try next: the method that recovers most in the committed study."""

from __future__ import annotations

#: Per cent of the lost log-perplexity that methods recover, a mean over seven kinds of text, given equal data
#: (benchmarks/domains_mix_51k_batch2.json).
RECOVERED = {"best": 63.0, "lora-all": 49.5}


def better_method(method: str) -> str | None:
    """A sentence on the method that the study puts first; None where it was the one that ran.

    Example:
        >>> better_method("best")
    """
    if method == "best":
        return None
    best, lora = (f"{RECOVERED[name]:.0f} %" for name in RECOVERED)
    return (
        f"--method best recovers most in the committed study: {best} of the lost log-perplexity over seven kinds of "
        f"text, LoRA {lora}"
    )
