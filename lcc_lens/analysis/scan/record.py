"""Metadata of a scan: which weights, data and settings it belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lcc_lens.core.config import package_version
from lcc_lens.core.showing import Shown
from lcc_lens.models.hooked.activations import Positions


@dataclass(frozen=True, repr=False)
class ScanRecord(Shown):
    """The weights, data and settings of a scan.

    ``negatives`` says how wrong answers were chosen (see :class:`~lcc_lens.data.datasets.Data`). ``pattern`` and
    ``sparsity`` describe the pruned model's zeros. ``dense_heads`` and ``removed_heads`` are the pair's head map if
    whole heads were removed, else empty.
    """

    dense: str
    pruned: str
    dense_sha256: str
    pruned_sha256: str
    data: str
    source: str
    positions: Positions
    n_examples: int
    n_samples: int
    max_length: int
    probe_rank: int | None
    seed: int
    version: str = field(default_factory=package_version)
    groups: tuple[str, ...] = ()
    negatives: str | None = None
    pattern: str = ""
    sparsity: float | None = None
    dense_heads: tuple[tuple[int, ...], ...] = ()
    removed_heads: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class StoredScores:
    """A selector's scores without their tensors."""

    selector: str
    n_examples: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class StoredTokens:
    """An example's tokens without their losses."""

    example: int
    pieces: tuple[str, ...]
    loss_from: int
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class ScanParts:
    """What ``scan.json`` holds beside the record."""

    scan_sha256: str
    selected_by: dict[str, StoredScores]
    tokens: tuple[StoredTokens, ...]
