"""One self-contained page for a finished run: the numbers, the loss map, the training curve."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcc_lens.files import write_text
from lcc_lens.plotting import COLORS, plot_loss_map, plot_training
from lcc_lens.restoration import Restoration
from lcc_lens.scan import Scan
from lcc_lens.training import Step

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 Inter, Helvetica, Arial, sans-serif; color: #1b1b1b; margin: 0 auto; max-width: 1080px;
  padding: 24px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 32px 0 8px; }
.lead { font-size: 18px; color: #333; margin: 0 0 20px; } .scroll { overflow-x: auto; }
.side { display: flex; flex-wrap: wrap; gap: 24px; align-items: flex-start; } .side > div { overflow-x: auto; }
.side caption { max-width: 380px; }
table { border-collapse: collapse; } th, td { padding: 6px 14px; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } caption { text-align: left; color: #555; padding-bottom: 6px; }
.dense { color: %(dense)s; } .pruned { color: %(pruned)s; } .restored { color: %(restored)s; } small { color: #555; }
"""


def write_page(
    path: Path, scan: Scan, restoration: Restoration, steps: Sequence[Step], results: dict[str, Any]
) -> Path:
    """Write the page; it opens with no network and holds everything it shows."""
    losses = restoration.record.losses
    loss_map = plot_loss_map(scan)
    training = plot_training(steps, losses.get("dense"), losses.get("pruned"))
    body = [
        f"<h1>{html.escape(Path(scan.record.dense).name)}: pruned and restored</h1>",
        f'<p class="lead">{_verdict(scan, results)}</p>',
        '<div class="scroll">', _table(results), "</div>",
        "<h2>What pruning took from each attention head</h2>",
        "<p>Darker heads changed more. Point at a head for its numbers.</p>",
        '<div class="side">', "<div>", _embedded(loss_map, with_library=True), "</div>", "<div>",
        _worst_heads(scan), "</div>",
        "</div>",
        "<h2>How it came back</h2>",
        '<div class="scroll">', _embedded(training, with_library=False), "</div>",
        f"<p><small>{_provenance(scan, restoration)}</small></p>",
    ]  # fmt: skip
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>lcc_lens</title>'
        f"<style>{_STYLE % COLORS}</style></head><body>"
    )
    write_text(path, head + "\n".join(body) + "</body></html>\n")
    return path


def _embedded(figure: Any, *, with_library: bool) -> str:
    settings = {"displaylogo": False, "displayModeBar": "hover"}
    text: str = figure.to_html(include_plotlyjs=with_library, full_html=False, config=settings)
    return text


def _worst_heads(scan: Scan, n: int = 12) -> str:
    """The heads that changed most, as a table."""
    rows = [
        f"<tr><td>L{row.layer}H{row.head}</td><td>{100 * row.relative_loss:.0f} %</td><td>{row.cosine:.2f}</td>"
        f"<td>{100 * row.constant_share:.0f} %</td></tr>"
        for row in scan.table().sort_values("relative_loss", ascending=False).head(n).itertuples()
    ]
    return (
        "<table><caption>Heads that changed most. The constant share of the squared difference is what a constant can "
        "mend at most.</caption><tr><th>head</th><th>changed</th><th>cosine</th><th>constant share</th></tr>"
        + "".join(rows)
        + "</table>"
    )


def _verdict(scan: Scan, results: dict[str, Any]) -> str:
    shares = {name: value for name, value in results["share_recovered"].items() if value is not None}
    loss = scan.relative_loss
    worst = int(loss.argmax())
    layer, head = divmod(worst, loss.shape[1])
    parts = [
        f"Pruning changed the heads' outputs by {100 * float(loss.median()):.0f} % at the median head and by "
        f"{100 * float(loss.max()):.0f} % at L{layer}H{head}."
    ]
    if shares:
        told = " and ".join(
            f"{100 * value:.0f} % of what was lost on {html.escape(name)}" for name, value in shares.items()
        )
        parts.append(f"The restoration brought back {told}, in log-likelihood.")
    return " ".join(parts)


def _table(results: dict[str, Any]) -> str:
    models = results["models"]
    rows = []
    for name, entry in models.items():
        cells = "".join(f"<td>{value}</td>" for value in format_scores(entry["tasks"]).values())
        rows.append(f'<tr><td class="{html.escape(name)}"><b>{html.escape(name)}</b></td>{cells}</tr>')
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in format_scores(next(iter(models.values()))["tasks"]))
    return f"<table><caption>Held-out data</caption><tr><th>model</th>{titles}</tr>{''.join(rows)}</table>"


def format_scores(tasks: dict[str, Any]) -> dict[str, str]:
    """Column title to text for one model's scores: perplexity, response loss, accuracy with standard error."""
    columns: dict[str, str] = {}
    for name, scores in tasks.items():
        if "perplexity" in scores:
            columns[f"{name}: perplexity"] = f"{scores['perplexity']:.2f}"
        elif "response_loss" in scores:
            columns[f"{name}: loss"] = f"{scores['response_loss']:.3f}"
        else:
            columns[f"{name}: accuracy (n = {scores['n']})"] = (
                f"{100 * scores['acc']:.1f} ± {100 * scores['stderr']:.1f} %"
            )
    return columns


def _provenance(scan: Scan, restoration: Restoration) -> str:
    record = restoration.record
    return html.escape(
        f"Scan: {scan.record.source}, {scan.record.n_examples} sequences. Training: {record.data}, {record.n_examples} "
        f"examples, seed {record.seed}. Dense weights {record.dense_sha256[:12]}, pruned weights "
        f"{record.pruned_sha256[:12]} (SHA-256). lcc_lens {record.version}."
    )
