"""A scan in a few lines: models, data, how much changed and where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lcc_lens.analysis.scan.record import ScanRecord
from lcc_lens.analysis.statistics import DifferenceStatistics
from lcc_lens.core.heads import Head

_N_MOST = 6

#: Columns of both tables, in their order.
COLUMNS = ("relative_loss", "cosine", "constant_share", "input_share")


def scan_facts(
    record: ScanRecord, loss: Float[Tensor, "layer head"], alive: Sequence[Head], constant_share: float
) -> dict[str, Any]:
    """What the representation of a scan lists of its head outputs.

    Args:
        record: of the scan.
        loss: relative change of each head's output.
        alive: the heads that pruning did not remove.
        constant_share: the fraction of the squared difference that constants could correct.
    """
    n_removed, order = loss.numel() - len(alive), sorted(alive, key=lambda head: -float(loss[head]))
    sparsity = "" if record.sparsity is None else f" ({record.sparsity:.0%} zeros, {record.pattern})"
    facts = {
        "dense": record.dense,
        "pruned": record.pruned + sparsity,
        "data": f"{record.n_examples} sequences of {record.data}; {record.n_samples:,} positions ({record.positions})",
        "heads": f"{len(alive)} in {loss.shape[0]} layers" + (f", {n_removed} more removed whole" if n_removed else ""),
    }
    if order:
        most, median, least = (float(loss[order[place]]) for place in (0, len(order) // 2, -1))
        facts |= {
            "changed": f"{median:.0%} of a head's output (median), {least:.0%} to {most:.0%}",
            "changed most": ", ".join(f"{head} {float(loss[head]):.0%}" for head in order[:_N_MOST]),
            "constant": f"{constant_share:.0%} of the squared difference, which constants could correct",
        }
    return facts


def pooled(statistics: DifferenceStatistics, layer: int) -> dict[str, float]:
    """The statistics of a layer with all its heads taken together."""
    mean = statistics.mean_difference[layer].flatten()[None, None]
    names = ("squared_dense", "squared_pruned", "squared_difference", "dot", "mse_stderr")
    sums = (getattr(statistics, name)[layer].sum()[None, None] for name in names)
    whole = DifferenceStatistics(statistics.n_samples, mean, *sums)
    return {name: float(getattr(whole, name)) for name in COLUMNS}
