"""Write the model card of an export."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from lcc_lens.core.metrics import learned_warning
from lcc_lens.core.text import code, markdown
from lcc_lens.restoration.result import Restoration


def model_card(restoration: Restoration, metrics: Mapping[str, Any], difference: float) -> str:
    """The text of an export's model card.

    Args:
        restoration: what was exported.
        metrics: measured numbers by name and column; names with the same columns share a table.
        difference: the largest logit difference to the hooked model.
    """
    record = restoration.record
    lines = [
        "---", "library_name: transformers", "tags: [pruned, restorelcc, lcc-lens]", "---", "",
        f"# {markdown(Path(record.pruned).name)}, restored", "",
        f"{code(record.pruned)} (pruned from {code(record.dense)}) with {_what_is_folded(restoration)}. Loads with "
        "plain transformers; every other tensor is bit-identical to the pruned model, and its zeros stay.", "",
        "| | |", "|---|---|",
        f"| method | {markdown(record.method)} |",
        *([f"| heads | {len(restoration.heads)} |"] if restoration.heads else []),
        *([f"| MLPs | {len(restoration.mlp.parts)} |"] if restoration.mlp is not None else []),
        *([f"| weights changed | {len(dict(restoration.changes))} |"] if restoration.changes else []),
        *([f"| trained parameters | {record.n_trained} |"] if record.n_trained is not None else []),
        f"| learned from | {markdown(record.data)}, {record.n_examples} examples, seed {record.seed} |",
        f"| largest logit difference to the hooked model | {difference:.2g} |",
        f"| pruned weights (SHA-256) | {markdown(record.pruned_sha256)} |",
        f"| lcc_lens | {markdown(record.version)} |",
    ]  # fmt: skip
    if record.losses:
        lines += ["", "Loss on held-out responses while training, nats per token:", "", "| model | loss |", "|---|---|"]
        lines += [f"| {markdown(name)} | {value:.4f} |" for name, value in record.losses.items()]
        if record.n_trained != 0 and (warning := learned_warning(record.losses)):
            lines += ["", f"**Read with care**: {warning}."]
    for columns, alike in groupby(metrics.items(), lambda entry: tuple(entry[1])):
        lines += ["", "| | " + " | ".join(map(markdown, columns)) + " |", "|---|" + "---|" * len(columns)]
        lines += [f"| {markdown(name)} | {' | '.join(map(markdown, values.values()))} |" for name, values in alike]
    return "\n".join(lines) + "\n"


def _what_is_folded(restoration: Restoration) -> str:
    what = {"z": "head folded into the biases of the attention output projections",
            "mlp": "MLP folded into the biases of the down projections"}  # fmt: skip
    parts = [f"a constant per {what[site]}" for site in restoration.footprint.biases]
    if restoration.changes:
        kinds = sorted({change.kind for _, change in restoration.changes})
        parts.append(f"weights changed under their zero pattern ({', '.join(kinds)})")
    return " and ".join(parts) or "nothing changed"
