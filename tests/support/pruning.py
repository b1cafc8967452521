"""Pruning a checkpoint with token ids instead of data sets."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from lcc_lens.models.architecture.sparsity_patterns import Pattern
from lcc_lens.pruning.methods.settings import PruneConfig
from lcc_lens.pruning.prune import prune_checkpoint


def prune_tokens(model_dir: Path, out: Path, method: str, pattern: Pattern, **options: Any) -> dict[str, Any]:
    """Prune on the CPU; options are those of `PruneConfig` and of `prune_checkpoint`."""
    names = {field.name for field in fields(PruneConfig)} & options.keys()
    config = PruneConfig(method, pattern, **{name: options.pop(name) for name in names})
    defaults = {"device": torch.device("cpu"), "dtype": torch.float32, "provenance": {}}
    return prune_checkpoint(model_dir, out, config, **{**defaults, **options})
