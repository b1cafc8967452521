"""Reads a run folder: scan, restoration, metrics and log, checked against each other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcc_lens.analysis.scan.scan import SCAN_RECORD, Scan
from lcc_lens.core.errors import RequestError
from lcc_lens.core.metrics import share_recovered
from lcc_lens.core.reading import read_json
from lcc_lens.restoration.result import RESTORATION_TENSORS, Restoration
from lcc_lens.restoration.run_folder import RUN_LOG, RUN_METRICS

#: Fields of a logged step that the page draws.
_STEP_FIELDS = ("step", "loss", "validation_loss")


@dataclass(frozen=True)
class RunContents:
    """Contents of a run; what does not exist yet is None or empty.

    ``losses`` are those of dense, pruned and restored in nats per response token, ``sequences`` the number of sequences
    they are measured on (None if the run does not record it), ``steps`` the logged optimiser steps.
    """

    path: Path
    scan: Scan | None
    restoration: Restoration | None
    losses: Mapping[str, float]
    sequences: int | None
    steps: tuple[Mapping[str, Any], ...]

    @classmethod
    def read(cls, path: str | Path) -> RunContents:
        """Read a run folder.

        Raises:
            RequestError: there is neither a scan nor a restoration, a file is damaged, or the files belong to
                different weights.
        """
        path = Path(path)
        has_scan, has_restoration = (path / SCAN_RECORD).exists(), (path / RESTORATION_TENSORS).exists()
        if not (has_scan or has_restoration):
            raise RequestError(
                f"expected a run with a scan or a restoration in {path}, got neither; run lcc-lens scan or "
                "restore first"
            )
        scan = Scan.load(path) if has_scan else None
        restoration = Restoration.load(path) if has_restoration else None
        metrics = read_json(path / RUN_METRICS) if (path / RUN_METRICS).exists() else None
        _check_weights(path, scan, restoration, metrics)
        validation = (metrics or {}).get("validation", {})
        return cls(
            path=path,
            scan=scan,
            restoration=restoration,
            losses=dict(restoration.record.losses) if restoration else {},
            sequences=validation.get("sequences"),
            steps=_steps(path / RUN_LOG) if restoration else (),
        )

    @property
    def share_recovered(self) -> float | None:
        """Recovered share of the lost log-likelihood; None without a restoration or if nothing was lost."""
        if not {"dense", "pruned", "restored"} <= set(self.losses):
            return None
        return share_recovered(*(self.losses[name] for name in ("dense", "pruned", "restored")))


def _check_weights(
    path: Path, scan: Scan | None, restoration: Restoration | None, metrics: Mapping[str, Any] | None
) -> None:
    """Refuse a scan, a restoration and metrics of different models."""
    hashes_of = {
        "scan": scan and (scan.record.dense_sha256, scan.record.pruned_sha256),
        "restoration": restoration and (restoration.record.dense_sha256, restoration.record.pruned_sha256),
        "metrics": metrics and (metrics.get("dense_sha256"), metrics.get("pruned_sha256")),
    }
    present = {name: hashes for name, hashes in hashes_of.items() if hashes is not None}
    (first, expected), *others = present.items()
    for name, hashes in others:
        if hashes != expected:
            raise RequestError(
                f"expected one pair of models in {path}, got a {first} and a {name} of different weights; "
                "scan or restore again"
            )


def _steps(log: Path) -> tuple[Mapping[str, Any], ...]:
    """The steps of a run's log; empty if nothing was trained."""
    if not log.exists():
        return ()
    steps = []
    for number, line in enumerate(log.read_text(encoding="utf-8").splitlines(), 1):
        try:
            step = json.loads(line)
            steps.append({name: step.get(name) for name in _STEP_FIELDS})
        except (json.JSONDecodeError, AttributeError) as error:
            raise RequestError(f"expected a step as JSON in line {number} of {log}, got {line[:40]!r}") from error
    return tuple(steps)
