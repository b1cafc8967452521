"""What commands print: tables and sentences on the terminal."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lcc_lens.scan import Scan


_SITE_NAMES = {"z": "head outputs", "mlp": "MLP after its activation", "resid": "residual stream"}


def console() -> Any:
    """The terminal, as wide as it is now."""
    from rich.console import Console

    return Console()


def show_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; the first column is text, the others are numbers."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=any(columns))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def pruning_rows(report: dict[str, Any]) -> list[list[str]]:
    """What a pruning report says, as rows of a name and a value."""
    if "share_removed" not in report:
        rows = [["sparsity", f"{report['sparsity']:.4f}"], ["pattern", report["pattern_found"]]]
        return [*rows, ["matrices", str(len(report["matrices"]))]]
    heads, neurons = sum(map(len, report["removed_heads"])), sum(report["removed_neurons"])
    form = "out of the shapes" if report["sliced"] else "zero"
    return [
        [f"share of the layers' weights now {form}", f"{report['share_removed']:.4f}"],
        ["heads removed", str(heads)],
        ["neurons removed", str(neurons)],
    ]


def refit_rows(report: dict[str, Any]) -> list[list[str]]:
    """What a refit's report says, as rows of a name and a value."""
    left = sorted(report["error_left"].values())
    return [
        ["matrices refitted, zeros kept", str(len(left))],
        ["squared error left on the calibration inputs, median", f"{median(left):.3f}"],
        ["least and most", f"{left[0]:.3f} and {left[-1]:.3f}"],
        ["calibration", f"{report['calibration']['data']}, {report['calibration']['sequences']} sequences"],
    ]


def show_comparison(bare: dict[str, Any], rows: list[dict[str, Any]], run: Path) -> None:
    """Print a comparison: means over seeds, with the standard deviation where there are several."""

    def number(row: dict[str, Any], key: str, form: str) -> str:
        value, spread = row[key], row[f"{key}_sd"]
        return "" if value is None else format(value, form) + ("" if spread is None else f" ± {spread:{form}}")

    columns = ["", "perplexity", "recovered", "KL", "loss", "trained", "added", "zeros", "decode", "seconds"]
    keys = [("perplexity", ".2f"), ("recovered", ".1%"), ("kl", ".3f"), ("response_loss", ".3f")]
    table = [
        [name, f"{m['perplexity']:.2f}", "", f"{m['kl']:.3f}", f"{m['response_loss']:.3f}", *5 * [""]]
        for name, m in bare.items()
    ]
    for row in rows:
        label = row["entry"] + (f" ({row['failed']} failed)" if row["failed"] else "")
        zeros = "" if row["zeros_kept"] is None else f"{row['zeros_kept']:.0%}"
        speed = row["inference"]
        costs = [
            _rounded(row["n_trained"]), _rounded(row["n_added"]), zeros,
            "" if speed is None else f"{speed['decode_ratio']['median']:.2f}×", number(row, "training_seconds", ".0f"),
        ]  # fmt: skip
        table.append([label, *(number(row, *key) for key in keys), *costs])
    first = next(iter(bare["dense"]["texts"]))
    show_table(
        f"comparison: {run} (perplexity of {first}; KL to the dense model and loss on held-out responses; numbers "
        "trained and added to the checkpoint; zeros left once merged; decoding's time by the pruned model's)",
        columns, table,
    )  # fmt: skip
    _show_texts_and_tasks(bare, rows)


def _show_texts_and_tasks(bare: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Print the perplexity of all texts and the accuracy of all tasks, if there are several or any."""
    texts, tasks = list(bare["dense"]["texts"]), list(bare["dense"]["tasks"])
    if len(texts) + len(tasks) < 2:
        return
    table = [
        [name, *(f"{m['texts'][text]['perplexity']:.2f}" for text in texts),
         *(f"{m['tasks'][task]['acc']:.1%}" for task in tasks)]
        for name, m in bare.items()
    ]  # fmt: skip
    for row in rows:
        if row["seeds"]:
            accuracies = (row["tasks"][task] for task in tasks)
            gains = ("[{:+.1%}, {:+.1%}]".format(*accuracy["gain_interval"]) for accuracy in accuracies)
            scored = [f"{row['tasks'][task]['acc']:.1%} {gain}" for task, gain in zip(tasks, gains, strict=True)]
            table.append([row["entry"], *(f"{row[f'perplexity_{text}']:.2f}" for text in texts), *scored])
    title = "perplexity by text" + ("; zero-shot accuracy [95 % interval of its gain]" if tasks else "")
    show_table(title, ["", *texts, *tasks], table)


def _rounded(count: float | None) -> str:
    """A count in few characters: 960, 34.6k, 2.4M; none where there is none."""
    if count is None:
        return ""
    if count < 1000:
        return f"{count:.0f}"
    return f"{count / 1e3:.1f}k" if count < 1e6 else f"{count / 1e6:.1f}M"


def show_scan(found: Scan, run_dir: Path) -> None:
    """Write the loss map and print the heads that changed most."""
    from lcc_lens.plotting import plot_loss_map, write_html

    page = run_dir / "loss_map.html"
    write_html(plot_loss_map(found), page)
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
    from lcc_lens.heads import Head

    rows = []
    for name, scores in found.selected_by.items():
        value = scores.value.nan_to_num(nan=float("-inf")).clone()
        for layer, removed in enumerate(found.head_map.removed):
            value[layer, list(removed)] = float("-inf")
        flat = value.flatten()
        best = [Head(int(i) // scores.value.shape[1], int(i) % scores.value.shape[1]) for i in flat.topk(n).indices]
        told = [f"{head} {float(scores.value[head]):.2g} ± {float(scores.stderr[head]):.1g}" for head in best]
        rows.append([name, "   ".join(told)])
    return rows


def show_losses(losses: dict[str, float], n_heads: int, run_dir: Path) -> None:
    """Print held-out losses and the share of the loss that was recovered."""
    from lcc_lens.metrics import share_recovered

    rows = [[name, f"{value:.4f}"] for name, value in losses.items()]
    share = share_recovered(losses["dense"], losses["pruned"], losses["restored"])
    rows.append(["share recovered", "nothing was lost" if share is None else f"{share:.1%}"])
    title = "held-out response loss" + (f", {n_heads} heads" if n_heads else "")
    show_table(title, ["model", "nats per token"], rows)
    console().print(f"restoration {run_dir}", soft_wrap=True)


def show_results(models: dict[str, Any], title: str) -> None:
    """Print the scores of models side by side."""
    from lcc_lens.score_text import format_scores

    columns = ["model", *format_scores(next(iter(models.values()))["tasks"])]
    show_table(title, columns, [[name, *format_scores(entry["tasks"]).values()] for name, entry in models.items()])


def show_report(found: dict[str, Any], title: str) -> None:
    """Print an efficiency report: sizes, times, and what they say."""
    from lcc_lens.report_text import findings, size_table, time_table

    show_table(title, *size_table(found))
    if found["ratios"]:
        show_table("median and interval of interleaved rounds", *time_table(found))
    for sentence in findings(found):
        console().print(sentence, highlight=False, markup=False)
