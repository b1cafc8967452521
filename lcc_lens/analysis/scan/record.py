"""Metadata of a scan: which weights, data and settings it belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from lcc_lens.core.config import package_version
from lcc_lens.core.errors import RequestError
from lcc_lens.core.showing import Shown
from lcc_lens.models.hooked.activations import Positions


@dataclass(frozen=True, repr=False)
class ScanRecord(Shown):
    """The weights, data and settings of a scan.

    ``negatives`` says how wrong answers were chosen (see :class:`~lcc_lens.data.datasets.Data`). ``pattern`` and
    ``sparsity`` describe the pruned model's zeros. ``dense_heads`` and ``removed_heads`` are the pair's head map if
    whole heads were removed, else empty. ``is_changed`` says that hooks or changed weights acted on a model, as inside
    ``restoration.applied_to(pair.pruned)``: the scan is not that of the checkpoints.
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
    is_changed: bool = False

    def require_alike(self, other: ScanRecord) -> None:
        """Refuse to compare scans of another dense model, or of other data or positions.

        Raises:
            RequestError: names what differs.
        """
        keys = ("dense_sha256", "data", "positions", "n_examples", "n_samples", "max_length", "dense_heads")
        for key in keys:
            own, others = getattr(self, key), getattr(other, key)
            if own != others:
                raise RequestError(f"expected two scans of the same {key}, got {own} and {others}; scan alike")
        if self.groups != other.groups:
            raise RequestError(f"expected two scans of the same examples of {self.data}, got others; scan alike")

    def without_places(self) -> ScanRecord:
        """The record without the names of models and data, whose hashes it keeps."""
        return replace(self, dense="", pruned="", data="", source="")


def require_own_models(is_changed: bool) -> None:
    """Refuse to keep a scan under the name of checkpoints whose models hooks or changed weights acted on.

    Raises:
        RequestError: says what serves instead.
    """
    if is_changed:
        raise RequestError(
            "expected models as their checkpoints are for a scan in a run, got one with hooks or changed weights; "
            "export it and scan that, or scan without a run"
        )


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
