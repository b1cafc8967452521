"""What to try next: the method that recovers most in the committed study, and roughly what it would cost here."""

from __future__ import annotations

import json
from pathlib import Path

from lcc_lens.restoration.run_folder import RUN_LOG

#: Per cent of the lost log-perplexity that methods recover (benchmarks/restorations_wanda50.json).
RECOVERED = {"lcc": 21.5, "best": 66.4}
#: What ``best`` takes beside ``lcc``'s training on as many examples, its refit included.
COST = 1.7


def better_method(method: str, run: Path, *, epochs: int) -> str | None:
    """A sentence on the method that the study puts first; None where it was the one that ran.

    Args:
        method: the method that ran.
        run: its directory, whose log has the seconds of every step.
        epochs: passes over the training data that it made; ``best`` makes one.
    """
    if method == "best":
        return None
    log = run / RUN_LOG
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    seconds = sum(json.loads(line)["seconds"] for line in lines)
    time = f"; here it would take about {_minutes(COST * seconds / epochs)}" if seconds else ""
    return (
        f"--method best recovers most in the committed study: {RECOVERED['best']:.0f} % of the lost log-perplexity, "
        f"lcc {RECOVERED['lcc']:.0f} %{time}"
    )


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"
