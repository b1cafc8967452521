"""A comparison as tables: what came back, what it cost, text by text and task by task, and what failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lcc_lens.evaluation.comparison.accuracies import mean_accuracy, tasks_made_worse

Row = Mapping[str, Any]
Bare = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Table:
    """A title, the heads of columns (the first is of names), and rows of text."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def comparison_tables(bare: Bare, rows: Sequence[Row]) -> list[Table]:
    """All tables that a comparison has numbers for.

    Args:
        bare: the dense and the pruned model's measures.
        rows: what :func:`~lcc_lens.evaluation.comparison.compare.summary` gives.
    """
    tables = [_recovery(bare, rows), _costs(rows)]
    if len(next(iter(bare.values()))["texts"]) > 1:
        tables.append(_texts(bare, rows))
    if next(iter(bare.values())).get("tasks"):
        tables += [_mean_accuracy(bare, rows), _tasks(bare, rows)]
    return tables


def failures(rows: Sequence[Row]) -> list[str]:
    """A line per entry with failed cells: how many, and the first one's error."""
    return [f"{row['entry']}: {row['failed']} failed: {row['errors'][0]}" for row in rows if row["failed"]]


def _recovery(bare: Bare, rows: Sequence[Row]) -> Table:
    text = next(iter(bare["dense"]["texts"]))
    columns = ["", "perplexity", "recovered", "KL", "response loss", "seeds"]
    table = [
        [name, f"{m['perplexity']:.2f}", "", f"{m['kl']:.3f}", f"{m['response_loss']:.3f}", ""]
        for name, m in bare.items()
    ]
    for row in rows:
        share = _spread(row, "recovered", ".1%") + _interval(row["recovered_interval"], ".1%")
        figures = (_spread(row, "perplexity", ".2f"), share, _spread(row, "kl", ".3f"))
        table.append([row["entry"], *figures, _spread(row, "response_loss", ".3f"), str(row["seeds"])])
    return Table(
        f"perplexity of {text} and share of its lost log-perplexity recovered [95 % interval over blocks]; KL to the "
        "dense model and loss in nats per held-out response token; ± standard deviation over seeds",
        columns, table,
    )  # fmt: skip


def _costs(rows: Sequence[Row]) -> Table:
    columns = ["", "trained", "added", "zeros kept", "prefill", "decode", "training s", "MiB"]
    table = []
    for row in rows:
        zeros, memory = row["zeros_kept"], row["memory_mib"]
        times = [
            "" if row["inference"] is None else f"{row['inference'][f'{phase}_ratio']['median']:.2f}×"
            for phase in ("prefill", "decode")
        ]
        sizes = [rounded(row["n_trained"]), rounded(row["n_added"]), "" if zeros is None else f"{zeros:.0%}"]
        table.append(
            [row["entry"], *sizes, *times, _spread(row, "training_seconds", ".0f"),
             "" if memory is None else f"{memory:,.0f}"]
        )  # fmt: skip
    return Table(
        "numbers trained and added to the checkpoint, zeros left once merged, times by the pruned model's, training",
        columns, table,
    )  # fmt: skip


def _texts(bare: Bare, rows: Sequence[Row]) -> Table:
    texts = list(bare["dense"]["texts"])
    table = [[name, *(f"{m['texts'][text]['perplexity']:.2f}" for text in texts)] for name, m in bare.items()]
    table += [[row["entry"], *(_spread(row, f"perplexity_{text}", ".2f") for text in texts)] for row in _done(rows)]
    return Table("perplexity by text", ["", *texts], table)


def _mean_accuracy(bare: Bare, rows: Sequence[Row]) -> Table:
    columns = ["", "mean", "standard error", "gain", "recovered", "interval"]
    shares = ["accuracy"]
    worse = tasks_made_worse({name: model["tasks"] for name, model in bare.items()})
    if 0 < len(worse) < len(bare["dense"]["tasks"]):  # elsewhere the pruned model is no worse, and the mean hides it
        columns += [f"recovered in {', '.join(worse)}", "interval"]
        shares.append("worse")
    table = []
    for name, model in bare.items():
        mean, stderr = mean_accuracy(model["tasks"])
        table.append([name, f"{mean:.1%}", f"{stderr:.1%}", *[""] * (len(columns) - 2)])
    for row in _scored(rows):
        gain = _interval(row["accuracy_gain_interval"], "+.1%").strip()
        table.append([row["entry"], _spread(row, "accuracy", ".1%"), f"{row['accuracy_stderr']:.1%}", gain])
        for name in shares:
            share = row[f"{name}_recovered"]
            interval = _interval(row[f"{name}_recovered_interval"], ".0%").strip()
            table[-1] += ["" if share is None else f"{share:.0%}", interval]
        table[-1].append(str(row["accuracy_seeds"]))
    return Table(
        f"zero-shot accuracy, mean of {', '.join(bare['dense']['tasks'])} (95 % intervals, items drawn anew in each)",
        [*columns, "seeds"], table,
    )  # fmt: skip


def _tasks(bare: Bare, rows: Sequence[Row]) -> Table:
    tasks = list(bare["dense"]["tasks"])
    table = [
        [name, *(f"{m['tasks'][task]['acc']:.1%} ± {m['tasks'][task]['stderr']:.1%}" for task in tasks)]
        for name, m in bare.items()
    ]
    for row in _scored(rows):
        scores = (row["tasks"][task] for task in tasks)
        table.append([row["entry"], *(f"{s['acc']:.1%}{_interval(s['gain_interval'], '+.1%')}" for s in scores)])
    return Table(
        "accuracy by task, ± standard error [95 % interval of the gain on the same items]", ["", *tasks], table
    )


def rounded(count: int | float | None) -> str:
    """A count in few characters: 960, 34.6k, 2.4M; none where there is none."""
    if count is None:
        return ""
    if count < 1000:
        return f"{count:.0f}"
    return f"{count / 1e3:.1f}k" if count < 1e6 else f"{count / 1e6:.1f}M"


def _done(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["seeds"]]


def _scored(rows: Sequence[Row]) -> list[Row]:
    """Rows with accuracies; of an interrupted comparison, or where scoring failed, others have losses alone."""
    return [row for row in rows if row.get("tasks")]


def _spread(row: Row, key: str, form: str) -> str:
    value, spread = row[key], row[f"{key}_sd"]
    return "" if value is None else format(value, form) + ("" if spread is None else f" ± {spread:{form}}")


def _interval(interval: Sequence[float] | None, form: str) -> str:
    return "" if interval is None else " [{}, {}]".format(*(format(end, form) for end in interval))
