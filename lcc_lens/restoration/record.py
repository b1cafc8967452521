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


@dataclass(frozen=True, repr=False)
class RestorationRecord(Shown):
    """Where a restoration comes from: weights, data, settings, and its losses in nats per response token.

    ``data`` and ``n_examples`` are what its numbers were learned from: the training data, or the scan's where nothing
    was trained. ``n_trained`` counts the trained numbers (None where an earlier version did not say).
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

    def facts(self, heads: Sequence[Head], n_mlps: int, n_changes: int) -> dict[str, Any]:
        """What the representation of a restoration of these parts lists."""
        facts: dict[str, Any] = {
            "method": self.method, "dense": self.dense, "pruned": self.pruned,
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
