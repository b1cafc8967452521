"""The record of a pruning run (``pruning.json``): request, measured sparsity and calibration data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from lcc_lens.core.config import package_version
from lcc_lens.core.showing import Record
from lcc_lens.models.architecture.linear_maps import Matrix
from lcc_lens.models.architecture.sparsity_patterns import common_pattern, detect_pattern, shown_pattern, sparsity
from lcc_lens.pruning.methods.settings import PruneConfig

if TYPE_CHECKING:
    import pandas as pd


class PruningReport(Record):
    """The contents of ``pruning.json``."""

    def table(self) -> pd.DataFrame:
        """One row per matrix with its sparsity; of whole heads and neurons one row per layer with how many went."""
        import pandas as pd

        if "share_removed" not in self:
            return pd.DataFrame(self["matrices"].items(), columns=["matrix", "sparsity"])
        removed = zip(map(len, self["removed_heads"]), self["removed_neurons"], strict=True)
        rows = [(layer, *counts) for layer, counts in enumerate(removed)]
        return pd.DataFrame(rows, columns=["layer", "removed_heads", "removed_neurons"])

    def _facts(self) -> dict[str, Any]:
        if "share_removed" not in self:
            pattern, n_matrices = shown_pattern(self["pattern_found"], self["pattern"]), len(self["matrices"])
            return {"sparsity": f"{self['sparsity']:.4f}", "pattern": pattern, "matrices": n_matrices}
        form = "out of the shapes" if self["sliced"] else "zero"
        return {
            f"share of the layers' weights now {form}": f"{self['share_removed']:.4f}",
            "heads removed": sum(map(len, self["removed_heads"])),
            "neurons removed": sum(self["removed_neurons"]),
        }


def pruning_report(
    config: PruneConfig,
    plan: Sequence[Sequence[Matrix]],
    weights: Mapping[str, Tensor],
    *,
    tokens: Int[Tensor, "sequence pos"] | None,
    provenance: Mapping[str, Any],
    dense_sha256: str,
    ancestors: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure pruned weights and report them with the request.

    Args:
        weights: all pruned weights by name, in the layout of the checkpoint.
        tokens: the calibration sequences, if the method uses them.
        ancestors: SHA-256 of the models that the dense one was itself made from.

    Returns:
        A JSON object.
    """
    sparsities: dict[str, float] = {}
    patterns: set[str] = set()
    n_zeros = n_weights = 0
    for matrix in (matrix for layer in plan for matrix in layer if matrix.name in weights):
        rows = matrix.rows(weights[matrix.name])  # one at a time: they may come from disk
        sparsities[matrix.name] = sparsity(rows)
        patterns.add(detect_pattern(rows))
        n_zeros += int((rows == 0).sum())
        n_weights += rows.numel()
    return {
        "method": config.method,
        "pattern": "structured" if config.is_structured else str(config.pattern),
        "scope": config.scope,
        "sparsity_asked": config.pattern.sparsity,
        "sparsity": n_zeros / n_weights,
        "pattern_found": common_pattern(patterns),
        "matrices": sparsities,
        "calibration": tokens
        if tokens is None
        else {**provenance, "sequences": len(tokens), "length": tokens.shape[1]},
        "seed": config.seed,
        "dense_sha256": dense_sha256,
        "dense_ancestors": list(ancestors),
        "lcc_lens_version": package_version(),
    }
