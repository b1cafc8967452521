"""Pruning: scores say what a weight is worth, masks what stays, pruners treat a layer, `prune` walks a checkpoint.

Imports point ``scores, masks <- pruners <- settings <- stream <- apply``; scores and masks are pure functions of
tensors. A new method is one class that satisfies `LayerPruner` and one entry of ``pruners.PRUNERS``.
"""

from __future__ import annotations

from lcc_lens.pruning.apply import prune
from lcc_lens.pruning.masks import (
    NofM,
    Pattern,
    Scope,
    Unstructured,
    detect_pattern,
    keep_mask,
    parse_pattern,
    sparsity,
)
from lcc_lens.pruning.pruners import LayerPruner, Method
from lcc_lens.pruning.scores import magnitude_score, wanda_score
from lcc_lens.pruning.settings import PruneConfig

__all__ = [
    "LayerPruner",
    "Method",
    "NofM",
    "Pattern",
    "PruneConfig",
    "Scope",
    "Unstructured",
    "detect_pattern",
    "keep_mask",
    "magnitude_score",
    "parse_pattern",
    "prune",
    "sparsity",
    "wanda_score",
]
