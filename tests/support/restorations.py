"""Restorations with random constants, for tests of what reads or writes them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from lcc_lens.core.heads import Head, all_heads
from lcc_lens.models.hooked.sites import mlp_width
from lcc_lens.models.loading.hooked import load_hooked
from lcc_lens.restoration.injections.constants import SiteConstants
from lcc_lens.restoration.record import RestorationRecord
from lcc_lens.restoration.result import Restoration

TOKENS = torch.arange(3, 60)[None]


def restoration_of(directory: Path, heads: list[Head] | None = None, size: float = 0.3) -> Restoration:
    loaded = load_hooked(directory)
    cfg = loaded.model.cfg
    heads = heads or all_heads(cfg.n_layers, cfg.n_heads)
    constants = size * torch.randn(len(heads), cfg.d_head, generator=torch.Generator().manual_seed(2))
    record = RestorationRecord(
        "dense", str(directory), "", loaded.identity.sha256, "lcc", "none", 0, 0, losses={"dense": 1.0}
    )
    return Restoration(record, tuple(heads), constants, constants.clone(), torch.zeros_like(constants))


def with_mlp(restoration: Restoration, pruned: Path, layers: tuple[int, ...] = (0, 2)) -> Restoration:
    """The same with constants at some MLPs, too."""
    width = mlp_width(load_hooked(pruned).model)
    values = 0.3 * torch.randn(len(layers), width, generator=torch.Generator().manual_seed(7))
    parts = tuple(Head(layer, 0) for layer in layers)
    return dataclasses.replace(
        restoration, mlp=SiteConstants("mlp", parts, values, values.new_zeros(len(parts), 0), values)
    )


def mlp_alone(restoration: Restoration) -> Restoration:
    none = torch.zeros(0, 0)
    return dataclasses.replace(restoration, heads=(), constants=none, magnitudes=none, offset=none)
