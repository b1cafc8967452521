"""What commands print: tables and sentences on the terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lcc_lens.core.showing import Shown
from lcc_lens.core.text import visible

if TYPE_CHECKING:
    import pandas as pd

    from lcc_lens.analysis.scan.scan import Scan
    from lcc_lens.frontends.plotting.run_figures import Drawn


_SITE_NAMES = {"z": "head outputs", "mlp": "MLP after its activation", "resid": "residual stream"}


def console() -> Any:
    """The terminal, as wide as it is now; it shows a text as it is, nothing in it being markup or control."""
    from rich.console import Console
    from rich.text import Text

    class Terminal(Console):
        def render_str(self, text: str, **settings: Any) -> Text:
            return super().render_str(visible(text), **settings)

    return Terminal(markup=False, highlight=False, emoji=False)


def show_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table: columns of numbers to the right, text to the left."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=any(columns))
    for number, column in enumerate(columns):
        table.add_column(column, justify=_side([row[number] for row in rows]), overflow="fold")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def show_json(values: dict[str, Any]) -> None:
    """Print an object as JSON, in ASCII and not wrapped, so that it can be copied or piped."""
    console().out(json.dumps(values, indent=2))


def _side(cells: list[str]) -> Literal["left", "right"]:
    """The side of a column: numbers begin with a digit, perhaps behind a sign; empty cells and dashes fit either."""
    told = [cell for cell in cells if cell.strip(" –-")]
    return "right" if told and all(re.match(r"[+\-−<>~]?[\d.]", cell) for cell in told) else "left"


def show_facts(title: str, result: Shown) -> None:
    """Print what the representation of a result lists."""
    show_table(title, ["", ""], [list(row) for row in Shown.table(result).itertuples(index=False)])


def show_comparison(bare: dict[str, Any], rows: list[dict[str, Any]], out: Path) -> None:
    """Print a comparison: what was recovered, what it cost, and which runs failed."""
    from lcc_lens.evaluation.comparison.tables import comparison_tables, failures

    for table in comparison_tables(bare, rows) if bare else ():
        show_table(table.title, table.columns, table.rows)
    for line in failures(rows):
        console().print(line)
    console().print(f"comparison {out}", soft_wrap=True)


def show_loss_map(found: Scan, run_dir: Path) -> Path:
    """Write the loss map; draw it in a terminal with colours, too. Returns the page."""
    from lcc_lens.frontends.plotting.head_maps import plot_loss_map
    from lcc_lens.frontends.plotting.writing import write_html
    from lcc_lens.frontends.terminal_map import terminal_map

    page, terminal = run_dir / "loss_map.html", console()
    write_html(plot_loss_map(found), page)
    if terminal.is_terminal and terminal.color_system and terminal.encoding.startswith("utf"):
        picture = terminal_map(found.relative_loss, found.head_map.removed, terminal.width)
        if picture is not None:
            terminal.print(picture)
    return page


def show_scan(found: Scan, run_dir: Path) -> None:
    """Show the loss map and the heads that changed most."""
    page = show_loss_map(found, run_dir)
    frame = found.table().query("not is_removed").sort_values("relative_loss", ascending=False).head(10)
    rows = [
        [f"L{row.layer}H{row.head}", f"{row.relative_loss:.1%}", f"{row.cosine:.3f}", f"{row.constant_share:.1%}"]
        for row in frame.itertuples()
    ]
    show_table("heads that changed most", ["head", "changed", "cosine", "constant share"], rows)
    show_table("what changed, by site (mean over layers)", ["site", "changed", "cosine", "constant share"], [
        [_SITE_NAMES[str(site)], f"{row.relative_loss:.1%}", f"{row.cosine:.3f}", f"{row.constant_share:.1%}"]
        for site, row in found.layer_table().groupby("site", sort=False).mean().iterrows()
    ])  # fmt: skip
    if found.selected_by:
        show_table("highest scores, with standard errors", ["selector", "heads"], selector_rows(found))
    console().print(f"scan {run_dir}\npage {page}", soft_wrap=True)


def selector_rows(found: Scan, n: int = 3) -> list[list[str]]:
    """Each selector's highest heads."""
    from lcc_lens.core.heads import Head

    rows = []
    for name, scores in found.selected_by.items():
        value = scores.value.nan_to_num(nan=float("-inf")).clone()
        for layer, removed in enumerate(found.head_map.removed):
            value[layer, list(removed)] = float("-inf")
        flat = value.flatten()
        best = [Head(int(i) // scores.value.shape[1], int(i) % scores.value.shape[1]) for i in flat.topk(n).indices]
        scored = [f"{head} {float(scores.value[head]):.2g} ± {float(scores.stderr[head]):.1g}" for head in best]
        rows.append([name, "   ".join(scored)])
    return rows


def show_losses(losses: dict[str, float], n_heads: int, run_dir: Path) -> None:
    """Print held-out losses and the share of the loss that was recovered."""
    from lcc_lens.core.metrics import learned_warning, share_recovered

    rows = [[name, f"{value:.4f}"] for name, value in losses.items()]
    share = share_recovered(losses["dense"], losses["pruned"], losses["restored"])
    learned = ", the task learned" if share is not None and learned_warning(losses) else ""
    rows.append(["recovered", "nothing was lost" if share is None else f"{share:.1%}{learned}"])
    title = "held-out response loss" + (f", {n_heads} heads" if n_heads else "")
    show_table(title, ["model", "nats per token"], rows)
    console().print(f"restoration {run_dir}", soft_wrap=True)


def loss_table(losses: dict[str, float]) -> pd.DataFrame:
    """The losses of :func:`show_losses` as numbers: model, nats per token, fraction recovered."""
    import pandas as pd

    from lcc_lens.core.metrics import share_recovered

    table = pd.DataFrame(losses.items(), columns=["model", "nats_per_token"])
    share = share_recovered(losses["dense"], losses["pruned"], losses["restored"])
    table["share_recovered"] = [share if name == "restored" else None for name in losses]
    return table


def show_recovery(found: dict[str, Any], run: Path) -> None:
    """Print how much of a task was recovered, and what it cost elsewhere."""
    from lcc_lens.evaluation.formatting import interval

    show_results(found["models"], f"{found['task']} on held-out items, and {found['text']}: {run}")
    sentence = "accuracy of the restored model above the pruned one's: "
    sentence += f"{found['gain']:+.1%} {interval(found['gain_interval'], '+.1%')}"
    if found["share_recovered"] is None:
        sentence += "; pruning lost nothing on these items"
    elif found["share_interval"] is None:
        sentence += f"; {found['share_recovered']:.0%} of a loss that may be none on so few items"
    else:
        sentence += f"; {found['share_recovered']:.0%} {interval(found['share_interval'], '.0%')} of what pruning lost"
    if (found["share_recovered"] or 0) > 1:
        sentence += ": beyond 100 %, so training also taught the task, which is not restoring"
    console().print(sentence, soft_wrap=True)


def show_panel(measured: dict[str, Any]) -> None:
    """Print recovery by domain, its mean and worst, and a warning where a domain got worse."""
    from lcc_lens.exporters.measured import panel_metrics

    metrics = panel_metrics(measured)
    warning = metrics.pop("warning", None)
    columns = list(next(iter(metrics.values())))
    rows = [[name, *(row.get(column, "") for column in columns)] for name, row in metrics.items()]
    show_table("perplexity and lost log-perplexity recovered, by kind of held-out text", ["", *columns], rows)
    if warning is not None:
        console().print(f"warning: {warning['']}", highlight=False, markup=False, soft_wrap=True)


def show_panels(measured: Mapping[str, dict[str, Any]]) -> None:
    """Print what several restorations recovered by domain, with mean and worst, side by side."""
    from lcc_lens.exporters.measured import panel_metrics

    metrics = {name: panel_metrics(panel) for name, panel in measured.items()}
    kinds = next(iter(measured.values()))["domains"]
    rows = [[kind, *(found[kind]["recovered"] for found in metrics.values())] for kind in kinds]
    for which in ("mean", "worst"):
        values = [panel[which] for panel in measured.values()]
        rows.append([which, *("" if value is None else f"{value:.1%}" for value in values)])
    show_table("lost log-perplexity recovered, by kind of held-out text", ["", *metrics], rows)


def show_results(models: dict[str, Any], title: str) -> None:
    """Print the scores of models side by side."""
    from lcc_lens.evaluation.evaluate import format_scores

    scores = {name: format_scores(entry["tasks"]) for name, entry in models.items()}
    columns = list(dict.fromkeys(column for row in scores.values() for column in row))
    rows = [[name, *(row.get(column, "–") for column in columns)] for name, row in scores.items()]
    show_table(title, ["model", *columns], rows)


def show_report(found: dict[str, Any], title: str) -> None:
    """Print an efficiency report: sizes, times, and what they say."""
    from lcc_lens.evaluation.efficiency.report_text import findings, size_table, time_table

    show_table(title, *size_table(found))
    if found["ratios"]:
        show_table("median and interval of interleaved rounds", *time_table(found))
    for sentence in findings(found):
        console().print(sentence)


def show_drawn(drawn: Drawn, out: Path) -> None:
    """Print which figures were drawn, and what the others need."""
    names = list(dict.fromkeys(path.stem for path in drawn.files))
    console().print(f"{out}: {', '.join(names)}", soft_wrap=True)
    if drawn.lacking:
        show_table("not drawn", ["figure", "what it needs"], [[name, why] for name, why in drawn.lacking.items()])
