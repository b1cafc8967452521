"""Write the model card of an export."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from lcc_lens.core.text import code, markdown
from lcc_lens.exporters.measured import Measured, Rows
from lcc_lens.restoration.record import RestorationRecord
from lcc_lens.restoration.result import Restoration

#: Before the table of results that were measured after the export.
_EVALUATED = "<!-- evaluated after the export -->"


def model_card(
    restoration: Restoration, metrics: Mapping[str, Any], difference: float, measured: Measured | None = None
) -> str:
    """The text of an export's model card.

    Args:
        restoration: what was exported.
        metrics: measured numbers by name and column; names with the same columns share a table.
        difference: the largest logit difference to the hooked model.
        measured: tables and warnings of what is known beside ``metrics``; what the record alone says if not given.
    """
    record = restoration.record
    measured = measured or Measured.of(record)
    lines = [
        "---", "library_name: transformers", "tags: [pruned, restorelcc, lcc-lens]", "---", "",
        f"# {markdown(Path(record.pruned_shown).name)}, restored", "",
        f"{code(record.pruned_shown)} (pruned from {code(record.dense)}){_refitted(record)} with "
        f"{_what_is_folded(restoration)}. Loads with plain transformers; every other tensor is bit-identical to the "
        f"{'pruned' if record.refit is None else 'refitted'} model, and its zeros stay.", "",
        "| | |", "|---|---|",
        f"| method | {markdown(record.method_shown)} |",
        *([f"| heads | {len(restoration.heads)} |"] if restoration.heads else []),
        *([f"| MLPs | {len(restoration.mlp.parts)} |"] if restoration.mlp is not None else []),
        *([f"| weights changed | {len(dict(restoration.changes))} |"] if restoration.changes else []),
        *([f"| trained parameters | {record.n_trained} |"] if record.n_trained is not None else []),
        f"| learned from | {markdown(record.data)}, {record.n_examples} examples, seed {record.seed} |",
        f"| largest logit difference to the hooked model | {difference:.2g} |",
        *(f"| {name} weights (SHA-256) | {markdown(sha256)} |" for name, sha256 in record.pruned_hashes.items()),
        f"| lcc_lens | {markdown(record.version)} |",
    ]  # fmt: skip
    if record.losses:
        lines += ["", "Loss on held-out responses while training, nats per token:", "", "| model | loss |", "|---|---|"]
        lines += [f"| {markdown(name)} | {value:.4f} |" for name, value in record.losses.items()]
    if measured.warnings:
        lines += ["", "**Read with care**:", "", *(f"- {markdown(warning)}" for warning in measured.warnings)]
    lines += _tables(metrics)
    for title, rows in measured.tables.items():
        lines += ["", f"{markdown(title)}:", *_tables(rows)]
    return "\n".join(lines) + "\n"


def with_evaluation(card: str, title: str, rows: Rows) -> str:
    """A model card with a table of later results at its end, in place of an earlier one."""
    return (
        "\n".join([card.partition(_EVALUATED)[0].rstrip(), "", _EVALUATED, f"{markdown(title)}:", *_tables(rows)])
        + "\n"
    )


def _tables(rows: Rows) -> list[str]:
    """Rows as tables, one for each set of columns."""
    lines = []
    for columns, alike in groupby(rows.items(), lambda entry: tuple(entry[1])):
        lines += ["", "| | " + " | ".join(map(markdown, columns)) + " |", "|---|" + "---|" * len(columns)]
        lines += [f"| {markdown(name)} | {' | '.join(map(markdown, values.values()))} |" for name, values in alike]
    return lines


def _refitted(record: RestorationRecord) -> str:
    return "" if record.refit_shown is None else f", refitted on {markdown(record.refit_shown)},"


def _what_is_folded(restoration: Restoration) -> str:
    what = {"z": "head folded into the biases of the attention output projections",
            "mlp": "MLP folded into the biases of the down projections"}  # fmt: skip
    parts = [f"a constant per {what[site]}" for site in restoration.footprint.biases]
    if restoration.changes:
        kinds = sorted({change.kind for _, change in restoration.changes})
        parts.append(f"weights changed under their zero pattern ({', '.join(kinds)})")
    return " and ".join(parts) or "nothing changed"
