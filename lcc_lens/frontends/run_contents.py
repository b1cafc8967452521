"""Reads a run folder: scan, restoration, metrics, log and head types, checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lcc_lens.analysis.head_types.result import HEAD_TYPES_FILE, HeadTypes
from lcc_lens.analysis.scan.scan import SCAN_RECORD, SCAN_TENSORS, Scan
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import sha256_file
from lcc_lens.core.metrics import share_recovered
from lcc_lens.core.reading import read_json_lines, read_record
from lcc_lens.restoration.result import RESTORATION_TENSORS, Restoration
from lcc_lens.restoration.run_folder import RUN_LOG, RUN_METRICS

_AGAIN = "restore again"


@dataclass(frozen=True)
class DrawnStep:
    """What the page draws of a logged step."""

    step: int
    loss: float
    validation_loss: float | None = None


@dataclass(frozen=True)
class _Validation:
    sequences: int | None = None


@dataclass(frozen=True)
class _Metrics:
    dense_sha256: str | None = None
    pruned_sha256: str | None = None
    validation: _Validation = field(default_factory=_Validation)


@dataclass(frozen=True)
class RunResults:
    """What a run computed from a pair of models; None for what does not exist yet."""

    scan: Scan | None
    restoration: Restoration | None
    metrics: _Metrics | None
    types: HeadTypes | None

    @classmethod
    def read(cls, path: Path) -> RunResults:
        """Read the results of a run folder.

        Raises:
            RequestError: a file is damaged, or they belong to different weights or restorations.
        """
        results = cls(
            scan=Scan.load(path) if (path / SCAN_RECORD).exists() else None,
            restoration=Restoration.load(path) if (path / RESTORATION_TENSORS).exists() else None,
            metrics=read_record(path / RUN_METRICS, _Metrics, _AGAIN) if (path / RUN_METRICS).exists() else None,
            types=HeadTypes.load(path) if (path / HEAD_TYPES_FILE).exists() else None,
        )
        results._check_weights(path)
        results._check_restoration(path)
        return results

    def _check_weights(self, path: Path) -> None:
        """Refuse results of different models."""
        records = {
            "scan": self.scan.record if self.scan else None,
            "restoration": self.restoration.record if self.restoration else None,
            "metrics": self.metrics,
            "table of head types": self.types.record if self.types else None,
        }
        hashes_of = {name: (r.dense_sha256, r.pruned_sha256) for name, r in records.items() if r is not None}
        first = next(iter(hashes_of), "")
        for name, hashes in hashes_of.items():
            if hashes != hashes_of[first]:
                raise RequestError(
                    f"expected one pair of models in {path}, got a {first} and a {name} of different weights; "
                    "scan or restore again"
                )

    def _check_restoration(self, path: Path) -> None:
        """Refuse head types of a restored model that is not the run's."""
        if self.types is None or self.restoration is None or "restored" not in self.types.record.models:
            return
        if self.types.record.restoration_sha256 != self.restoration.content_sha256:
            raise RequestError(
                f"expected {path / HEAD_TYPES_FILE} of the restoration beside it, got another one's; compute head "
                "types again, or delete the file"
            )


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
    steps: tuple[DrawnStep, ...]
    types: HeadTypes | None = None

    @classmethod
    def read(cls, path: str | Path) -> RunContents:
        """Read a run folder.

        Raises:
            RequestError: there is neither a scan nor a restoration, a file is damaged, or the files belong to
                different weights or restorations.
        """
        path = Path(path)
        results = RunResults.read(path)
        scan, restoration, metrics = results.scan, results.restoration, results.metrics
        if scan is None and restoration is None:
            raise RequestError(
                f"expected a run with a scan or a restoration in {path}, got neither; run lcc-lens scan or "
                "restore first"
            )
        log = path / RUN_LOG
        return cls(
            path=path,
            scan=scan,
            restoration=restoration,
            losses=dict(restoration.record.losses) if restoration else {},
            sequences=metrics.validation.sequences if metrics else None,
            steps=tuple(read_json_lines(log, DrawnStep, _AGAIN)) if restoration and log.exists() else (),
            types=results.types,
        )

    @property
    def share_recovered(self) -> float | None:
        """Recovered share of the lost log-likelihood; None without a restoration or if nothing was lost."""
        if not {"dense", "pruned", "restored"} <= set(self.losses):
            return None
        return share_recovered(*(self.losses[name] for name in ("dense", "pruned", "restored")))


def source_hashes(run: Path) -> dict[str, str | None]:
    """Hashes of the scan and the restoration of a run, which what is computed from them is stored with."""
    restoration = run / RESTORATION_TENSORS
    return {
        "scan_sha256": sha256_file(run / SCAN_TENSORS),
        "restoration_sha256": sha256_file(restoration) if restoration.exists() else None,
    }
