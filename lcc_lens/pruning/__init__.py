"""Pruning: scores say what a weight is worth, masks what stays, pruners treat a layer, `prune` walks a checkpoint.

Imports point ``scores, masks, obs, structured <- pruners, second_order, slimgpt <- settings <- stream, writing <-
apply``; the first four are pure functions of tensors. A new method is one class that satisfies `LayerPruner` and one
entry of ``settings.PRUNERS``.
"""

from __future__ import annotations

from lcc_lens.models.architecture.sparsity_patterns import (
    NofM,
    Pattern,
    Unstructured,
    detect_pattern,
    parse_pattern,
    sparsity,
)
from lcc_lens.pruning.apply import prune
from lcc_lens.pruning.masks import Scope, keep_mask
from lcc_lens.pruning.pruners import Choice, LayerPruner, LayerTask, Removed, Split
from lcc_lens.pruning.scores import magnitude_score, wanda_score
from lcc_lens.pruning.settings import Method, PruneConfig
from lcc_lens.pruning.structured import Schedule

__all__ = [
    "Choice",
    "LayerPruner",
    "LayerTask",
    "Method",
    "NofM",
    "Pattern",
    "PruneConfig",
    "Removed",
    "Schedule",
    "Scope",
    "Split",
    "Unstructured",
    "detect_pattern",
    "keep_mask",
    "magnitude_score",
    "parse_pattern",
    "prune",
    "sparsity",
    "wanda_score",
]
