"""What a run says, in words and numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.heads import Head
from lcc_lens.frontends.explorer.run_contents import RunContents
from lcc_lens.frontends.explorer.views import present
from lcc_lens.restoration.result import Restoration

#: From this share of the lost log-likelihood on, these words.
_WORDS = (
    (1.02, "The restored model beats the dense one on held-out loss"),
    (0.9, "Nearly everything came back"),
    (0.5, "More than half came back"),
    (0.1, "A part came back"),
    (0.0, "Little came back"),
)


@dataclass(frozen=True)
class Verdict:
    """A headline, sentences that explain it, and figures: each a name, a value with its unit, and a note."""

    headline: str
    sentences: tuple[str, ...]
    figures: tuple[dict[str, Any], ...]


def verdict(run: RunContents) -> Verdict:
    """What pruning took and what came back."""
    sentences, figures = [], []
    if run.scan is not None:
        sentences.append(_taken(run.scan))
        figures += _scan_figures(run.scan)
    if run.restoration is not None:
        sentences.append(_given_back(run, run.restoration))
        share = run.share_recovered
        value = "–" if share is None else f"{100 * share:.0f} %"
        figures.append({"name": "came back", "value": value, "note": "of the lost log-likelihood, held-out responses"})
    else:
        sentences.append("Nothing has been restored in this run yet.")
    # A number and its sign stay on one line
    return Verdict(_bound(_headline(run)), tuple(map(_bound, sentences)), tuple(figures))


def _bound(text: str) -> str:
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _headline(run: RunContents) -> str:
    if run.restoration is None:
        assert run.scan is not None
        median = 100 * _median(run.scan)
        return f"Pruning changed half of the heads by {median:.0f} % or more"
    share = run.share_recovered
    if share is None:
        return "There was nothing to bring back"
    return next((words for least, words in _WORDS if share >= least), "The restoration did harm")


def _taken(scan: Scan) -> str:
    worst = _worst(scan)
    zeros = ""
    if scan.record.sparsity is not None:
        pattern = f", {scan.record.pattern}" if scan.record.pattern not in ("", "unstructured", "dense") else ""
        zeros = f" ({100 * scan.record.sparsity:.0f} % zeros{pattern})"
    return (
        f"Pruning{zeros} changed the output of the median head by {100 * _median(scan):.0f} %, "
        f"and that of {worst} most, by {100 * float(scan.relative_loss[worst]):.0f} %. Of all that was lost at the "
        f"heads, one constant per head can mend {100 * scan.mendable_share():.0f} % at most."
    )


def _scan_figures(scan: Scan) -> list[dict[str, Any]]:
    worst = _worst(scan)
    n_layers, n_heads = scan.relative_loss.shape
    return [
        {"name": "changed, median head", "value": f"{100 * _median(scan):.0f} %",
         "note": f"of its output; {n_layers} layers × {n_heads} heads"},
        {"name": "changed most", "value": f"{100 * float(scan.relative_loss[worst]):.0f} %", "note": f"{worst}",
         "head": str(worst)},
        {"name": "a constant can mend", "value": f"{100 * scan.mendable_share():.0f} %",
         "note": "of the squared difference of all heads"},
    ]  # fmt: skip


def _given_back(run: RunContents, restoration: Restoration) -> str:
    record = restoration.record
    trained = "" if record.n_trained is None else f"{record.n_trained:,} trained numbers"
    where = f" in {len(restoration.heads)} heads" if restoration.heads else ""
    what = f"{record.method}" + (f" with {trained}{where}" if trained else where)
    losses = run.losses
    if run.share_recovered is None:
        return f"Restored by {what}; the held-out losses do not say how much came back."
    told = ", ".join(f"{name} {losses[name]:.3f}" for name in ("dense", "pruned", "restored"))
    count = f" ({run.sequences} sequences)" if run.sequences is not None else ""
    sentence = (
        f"Restored by {what} on {record.n_examples} examples of {Path(record.data).name}: held-out loss {told} nats "
        f"per response token{count}."
    )
    if losses["restored"] < losses["dense"]:
        sentence += " Below the dense model: training taught the task as well, which is more than restoring."
    return sentence


def _median(scan: Scan) -> float:
    """The change of the median head among those that were not removed."""
    return float(present(scan, scan.relative_loss).nanmedian().nan_to_num())


def _worst(scan: Scan) -> Head:
    """The head that changed most among those that were not removed."""
    loss = present(scan, scan.relative_loss).nan_to_num(nan=0.0)
    return Head(*divmod(int(loss.argmax()), loss.shape[1]))
