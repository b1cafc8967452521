"""Where a restoration comes from, and its parts as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lcc_lens.core.config import package_version
from lcc_lens.core.heads import Head
from lcc_lens.core.metrics import share_recovered
from lcc_lens.core.showing import Shown
from lcc_lens.restoration.injections.changes import Change
from lcc_lens.restoration.injections.constants import SiteConstants

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class RefitOrigin:
    """The pruned model as it was before a refit, and how many sequences of which data that was calibrated on."""

    pruned: str
    pruned_sha256: str
    data: str
    sequences: int


@dataclass(frozen=True, repr=False)
class RestorationRecord(Shown):
    """Where a restoration comes from: weights, data, settings, and its losses in nats per response token.

    ``data`` and ``n_examples`` are what its numbers were learned from: the training data, or the scan's where nothing
    was trained. ``n_trained`` counts the trained numbers (None where an earlier version did not say). If a method
    refitted the pruned model first, ``pruned`` is the refitted one, and ``refit`` says what it was; ``preset`` is the
    name under which ``method`` was requested, if it has one.
    """

    dense: str
    pruned: str
    dense_sha256: str
    pruned_sha256: str
    method: str
    data: str
    n_examples: int
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    version: str = field(default_factory=package_version)
    n_trained: int | None = None
    preset: str | None = None
    refit: RefitOrigin | None = None

    @property
    def method_shown(self) -> str:
        """The method for readers: a preset's name with what it trains."""
        return self.method if self.preset is None else f"{self.preset} ({self.method})"

    @property
    def pruned_shown(self) -> str:
        """The pruned model for readers: as it was before a refit."""
        return self.pruned if self.refit is None else self.refit.pruned

    @property
    def refit_shown(self) -> str | None:
        """What a refit was calibrated on, in words."""
        return None if self.refit is None else f"{self.refit.sequences} sequences of {self.refit.data}"

    @property
    def pruned_hashes(self) -> dict[str, str]:
        """The SHA-256 of the pruned weights, and of those refitted from them if there are any."""
        if self.refit is None:
            return {"pruned": self.pruned_sha256}
        return {"pruned": self.refit.pruned_sha256, "refitted": self.pruned_sha256}

    def facts(self, heads: Sequence[Head], n_mlps: int, n_changes: int) -> dict[str, Any]:
        """What the representation of a restoration of these parts lists."""
        facts: dict[str, Any] = {
            "method": self.method_shown, "dense": self.dense, "pruned": self.pruned_shown,
            **({} if self.refit is None else {"refitted": f"{self.pruned}, on {self.refit_shown}"}),
            "learned from": f"{self.n_examples} examples of {self.data}, seed {self.seed}",
            "trained parameters": "unknown" if self.n_trained is None else f"{self.n_trained:,}",
            "heads": heads, "MLPs": n_mlps, "changed weights": n_changes,
        }  # fmt: skip
        if self.losses.keys() >= {"dense", "pruned", "restored"}:
            recovered = share_recovered(*(self.losses[name] for name in ("dense", "pruned", "restored")))
            facts["recovered"] = "pruning lost nothing" if recovered is None else f"{recovered:.1%} of what was lost"
        if self.losses:
            losses = ", ".join(f"{name} {loss:.4f}" for name, loss in self.losses.items())
            facts["held-out loss"] = f"{losses} nats per token"
        return facts | {"version": self.version}


def parts_table(sites: Sequence[SiteConstants], changes: Sequence[tuple[str, Change]]) -> pd.DataFrame:
    """One row per part: its name, kind, how many numbers it holds, and the norm of a constant."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for site in sites:
        for part, value in zip(site.parts, site.values, strict=True):
            name = str(part) if site.site == "z" else f"L{part.layer} MLP"
            rows.append({"part": name, "kind": "constant", "numbers": value.numel(), "norm": float(value.norm())})
    for name, change in changes:
        numbers = sum(tensor.numel() for tensor in change.state_dict().values())
        rows.append({"part": name, "kind": change.kind, "numbers": numbers, "norm": None})
    return pd.DataFrame(rows, columns=["part", "kind", "numbers", "norm"])
