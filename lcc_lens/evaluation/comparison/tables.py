"""Tables of a comparison: recovery, costs, each text, each task, and the runs that failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lcc_lens.core.showing import Record
from lcc_lens.evaluation.comparison.accuracies import mean_accuracy, tasks_made_worse
from lcc_lens.evaluation.formatting import count, interval, number, with_spread

if TYPE_CHECKING:
    import pandas as pd

Row = Mapping[str, Any]
#: Figures of :func:`results_table`, beside the accuracies of single tasks.
_FIGURES = (
    "perplexity", "recovered", "kl", "response_loss", "accuracy", "n_trained", "n_added", "zeros_kept",
    "training_seconds", "memory_mib",
)  # fmt: skip
#: Measures of the ``dense`` and the ``pruned`` model, without restoration.
Unrestored = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Table:
    """A title, the heads of columns (the first is of names), and rows of text."""

    title: str
    columns: list[str]
    rows: list[list[str]]


class Comparison(Record):
    """The contents of ``comparison.json``: runs, and a row per entry in ``summary``."""

    def table(self) -> pd.DataFrame:
        """One row for the dense and the pruned model and for every entry; see :func:`results_table`."""
        return results_table(self["bare"], self["summary"])

    def _facts(self) -> dict[str, Any]:
        return result_facts(self["bare"], self["summary"])


def results_table(unrestored: Unrestored, rows: Sequence[Row]) -> pd.DataFrame:
    """The figures of a comparison as columns of numbers: means and standard deviations (``_sd``) over seeds."""
    import pandas as pd

    names = ["seeds", "failed", *(f"{name}{end}" for name in _FIGURES for end in ("", "_sd"))]
    entries = [{"entry": name, **{key: model.get(key) for key in _FIGURES}} for name, model in unrestored.items()]
    for row in rows:
        tasks = {f"accuracy_{task}": scores["acc"] for task, scores in row["tasks"].items()}
        entries.append({"entry": row["entry"], **{name: row.get(name) for name in names}, **tasks})
    return pd.DataFrame(entries)


def result_facts(unrestored: Unrestored, rows: Sequence[Row]) -> dict[str, str]:
    """A line per model and entry: its perplexity, what it recovered, or that all of its runs failed."""
    facts = {name: f"perplexity {number(model['perplexity'])}" for name, model in unrestored.items()}
    for row in rows:
        recovered = "" if row["recovered"] is None else f", recovered {_spread(row, 'recovered', '.1%')}"
        facts[row["entry"]] = f"perplexity {_spread(row, 'perplexity')}{recovered}" if row["seeds"] else "failed"
    return facts


def comparison_tables(unrestored: Unrestored, rows: Sequence[Row]) -> list[Table]:
    """All tables for which a comparison has measured something.

    Args:
        unrestored: the dense and the pruned model's measures.
        rows: the result of :func:`~lcc_lens.evaluation.comparison.compare.summary`.
    """
    tables = [_recovery(unrestored, rows), _costs(rows)]
    if len(unrestored["dense"]["texts"]) > 1:
        tables.append(_texts(unrestored, rows))
        if any(row.get("domains") for row in rows):
            tables.insert(0, _domains(unrestored, rows))
    if unrestored["dense"].get("tasks"):
        tables += [_mean_accuracy(unrestored, rows), _tasks(unrestored, rows)]
    return tables


def failures(rows: Sequence[Row]) -> list[str]:
    """A line per entry with failed runs: how many, and the error of the first."""
    return [f"{row['entry']}: {row['failed']} failed: {row['errors'][0]}" for row in rows if row["failed"]]


def _recovery(unrestored: Unrestored, rows: Sequence[Row]) -> Table:
    text = next(iter(unrestored["dense"]["texts"]))
    columns = ["", "perplexity", "recovered", "KL", "response loss", "seeds"]
    table = [
        [name, number(m["perplexity"]), "", number(m["kl"], ".3f"), number(m["response_loss"], ".3f"), ""]
        for name, m in unrestored.items()
    ]
    for row in rows:
        recovered = f"{_spread(row, 'recovered', '.1%')} {interval(row['recovered_interval'], '.1%')}".strip()
        figures = [
            _spread(row, "perplexity"),
            recovered,
            _spread(row, "kl", ".3f"),
            _spread(row, "response_loss", ".3f"),
        ]
        table.append([row["entry"], *figures, str(row["seeds"])])
    return Table(
        f"perplexity of {text} and share of its lost log-perplexity recovered [95 % interval over blocks]; KL to the "
        "dense model and loss in nats per held-out response token; ± standard deviation over seeds",
        columns, table,
    )  # fmt: skip


def _costs(rows: Sequence[Row]) -> Table:
    columns = ["", "trained", "added", "zeros kept", "prefill", "decode", "training s", "MiB"]
    table = []
    for row in rows:
        times = [
            "" if row["inference"] is None else f"{row['inference'][f'{phase}_ratio']['median']:.2f}×"
            for phase in ("prefill", "decode")
        ]
        sizes = [count(row["n_trained"]), count(row["n_added"]), number(row["zeros_kept"], ".0%")]
        training = [_spread(row, "training_seconds", ".0f"), number(row["memory_mib"], ",.0f")]
        table.append([row["entry"], *sizes, *times, *training])
    return Table(
        "parameters trained and added to the checkpoint, zeros kept once merged, times as multiples of the pruned "
        "model's, training",
        columns, table,
    )  # fmt: skip


def _domains(unrestored: Unrestored, rows: Sequence[Row]) -> Table:
    texts = list(unrestored["dense"]["texts"])
    table = []
    for row in rows:
        if row.get("domains"):
            shown = (row["domains"][text] for text in texts)
            table.append([row["entry"], _spread(row, "recovered_mean", ".1%"), _spread(row, "recovered_worst", ".1%")])
            table[-1] += [number(d["recovered"], ".1%") + ("*" if d["in_pool"] else "") for d in shown]
    title = "fraction of the lost log-perplexity recovered, by kind of text (*: the kind was calibrated or trained on)"
    return Table(title, ["", "mean", "worst", *texts], table)


def _texts(unrestored: Unrestored, rows: Sequence[Row]) -> Table:
    texts = list(unrestored["dense"]["texts"])
    table = [[name, *(number(m["texts"][text]["perplexity"]) for text in texts)] for name, m in unrestored.items()]
    table += [[row["entry"], *(_spread(row, f"perplexity_{text}") for text in texts)] for row in rows if row["seeds"]]
    return Table("perplexity by text", ["", *texts], table)


def _mean_accuracy(unrestored: Unrestored, rows: Sequence[Row]) -> Table:
    columns = ["", "mean", "standard error", "gain", "recovered", "interval"]
    groups = ["accuracy"]
    worse = tasks_made_worse({name: model["tasks"] for name, model in unrestored.items()})
    if 0 < len(worse) < len(unrestored["dense"]["tasks"]):  # the mean hides the tasks that pruning did not harm
        columns += [f"recovered in {', '.join(worse)}", "interval"]
        groups.append("worse")
    table = []
    for name, model in unrestored.items():
        table.append([name, *(number(value, ".1%") for value in mean_accuracy(model["tasks"]))])
        table[-1] += [""] * (len(columns) - 2)
    for row in _scored(rows):
        gain = interval(row["accuracy_gain_interval"], "+.1%")
        table.append([row["entry"], _spread(row, "accuracy", ".1%"), number(row["accuracy_stderr"], ".1%"), gain])
        for name in groups:
            table[-1] += [number(row[f"{name}_recovered"], ".0%"), interval(row[f"{name}_recovered_interval"], ".0%")]
        table[-1].append(str(row["accuracy_seeds"]))
    return Table(
        f"zero-shot accuracy, mean of {', '.join(unrestored['dense']['tasks'])} (95 % intervals, items resampled "
        "within each task)",
        [*columns, "seeds"], table,
    )  # fmt: skip


def _tasks(unrestored: Unrestored, rows: Sequence[Row]) -> Table:
    tasks = list(unrestored["dense"]["tasks"])
    table = [
        [name, *(with_spread(m["tasks"][task]["acc"], m["tasks"][task]["stderr"], ".1%") for task in tasks)]
        for name, m in unrestored.items()
    ]
    for row in _scored(rows):
        scores = (row["tasks"][task] for task in tasks)
        table.append([row["entry"], *(f"{s['acc']:.1%} {interval(s['gain_interval'], '+.1%')}" for s in scores)])
    return Table(
        "accuracy by task, ± standard error [95 % interval of the gain on the same items]", ["", *tasks], table
    )


def _scored(rows: Sequence[Row]) -> list[Row]:
    """Rows with accuracies; those of interrupted or failed scoring have only losses."""
    return [row for row in rows if row.get("tasks")]


def _spread(row: Row, key: str, form: str = ".2f") -> str:
    return with_spread(row[key], row[f"{key}_sd"], form)
