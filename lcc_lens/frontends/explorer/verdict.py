"""Summary of a run: a headline, sentences and key figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcc_lens.analysis.scan.scan import Scan
from lcc_lens.core.heads import Head
from lcc_lens.core.metrics import learned_warning
from lcc_lens.frontends.explorer.views import present
from lcc_lens.frontends.run_contents import RunContents
from lcc_lens.restoration.result import Restoration

#: The words for a recovered share of at least so much.
_WORDS = (
    (1.02, "Better than the dense model"),
    (0.9, "Almost fully restored"),
    (0.5, "Mostly restored"),
    (0.1, "Partly restored"),
    (0.0, "Barely restored"),
)


@dataclass(frozen=True)
class Verdict:
    """A headline, sentences that explain it, and figures: each a name, a value with its unit, and a note."""

    headline: str
    sentences: tuple[str, ...]
    figures: tuple[dict[str, Any], ...]


def verdict(run: RunContents) -> Verdict:
    """What pruning changed and how much was recovered."""
    sentences, figures = [], []
    if run.scan is not None:
        sentences.append(_changed(run.scan))
        figures += _scan_figures(run.scan)
    if run.restoration is not None:
        sentences.append(_restored(run, run.restoration))
        share = run.share_recovered
        value = "–" if share is None else f"{100 * share:.0f} %"
        figures.append({"name": "recovered", "value": value, "note": f"of the lost log-likelihood, {_validation(run)}"})
    else:
        sentences.append("Nothing has been restored in this run yet.")
    return Verdict(_unbroken(_headline(run)), tuple(map(_unbroken, sentences)), tuple(figures))


def _unbroken(text: str) -> str:
    """The text with every number and its percent sign on one line."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _headline(run: RunContents) -> str:
    if run.restoration is None:
        assert run.scan is not None
        return f"Pruning changed half of the heads by at least {100 * _median(run.scan):.0f} %"
    share = run.share_recovered
    if share is None:
        return "Pruning lost nothing on the validation data"
    if share < 0:
        return "Restoring made it worse: the validation loss is above the pruned model's"
    words = next(words for least, words in _WORDS if share >= least)
    return f"{words}: {100 * share:.0f} % of the lost log-likelihood recovered"


def _changed(scan: Scan) -> str:
    worst = _worst(scan)
    zeros = ""
    if scan.record.sparsity is not None:
        pattern = f", {scan.record.pattern}" if scan.record.pattern not in ("", "unstructured", "dense") else ""
        zeros = f" ({100 * scan.record.sparsity:.0f} % zeros{pattern})"
    return (
        f"Pruning{zeros} changed the output of the median head by {100 * _median(scan):.0f} %, and that of {worst} "
        f"most, by {100 * float(scan.relative_loss[worst]):.0f} %. One constant per head can correct at most "
        f"{100 * scan.mendable_share():.0f} % of the squared difference of all heads."
    )


def _scan_figures(scan: Scan) -> list[dict[str, Any]]:
    worst = _worst(scan)
    n_layers, n_heads = scan.relative_loss.shape
    return [
        {"name": "changed, median head", "value": f"{100 * _median(scan):.0f} %",
         "note": f"of its output; {n_layers} layers × {n_heads} heads"},
        {"name": "changed most", "value": f"{100 * float(scan.relative_loss[worst]):.0f} %", "note": f"{worst}",
         "head": str(worst)},
        {"name": "constant share", "value": f"{100 * scan.mendable_share():.0f} %",
         "note": "of the squared difference of all heads: what constants can correct"},
    ]  # fmt: skip


def _restored(run: RunContents, restoration: Restoration) -> str:
    record, losses = restoration.record, run.losses
    parameters = "" if record.n_trained is None else f" with {record.n_trained:,} trained parameters"
    where = f" in {len(restoration.heads)} heads" if restoration.heads else ""
    what = f"{record.method_shown}{parameters}{where}"
    if not {"dense", "pruned", "restored"} <= losses.keys():
        return f"Restored by {what}; the validation losses do not say how much was recovered."
    warning = learned_warning(losses)
    values = ", ".join(f"{name} {losses[name]:.3f}" for name in ("dense", "pruned", "restored"))
    sentence = (
        f"Restored by {what} on {record.n_examples} examples of {Path(record.data).name}: loss {values} nats per "
        f"response token, {_validation(run)}, by which training chose the parameters that it kept."
    )
    return f"{sentence} Read with care: {warning}." if warning else sentence


def _validation(run: RunContents) -> str:
    """The data that the recovered share is measured on."""
    return "on the validation responses" if run.sequences is None else f"on {run.sequences} validation responses"


def _median(scan: Scan) -> float:
    """Relative change of the median head, removed heads left out."""
    return float(present(scan, scan.relative_loss).nanmedian().nan_to_num())


def _worst(scan: Scan) -> Head:
    """The head that changed most, removed heads left out."""
    loss = present(scan, scan.relative_loss).nan_to_num(nan=0.0)
    return Head(*divmod(int(loss.argmax()), loss.shape[1]))
