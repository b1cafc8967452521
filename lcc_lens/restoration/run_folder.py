"""The files of a restoration's run: its settings, every training step, its result."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lcc_lens.analysis.scan.result import SCAN_RECORD, Scan
from lcc_lens.core.config import package_version
from lcc_lens.core.files import disk_errors, write_text
from lcc_lens.core.machine.processes import is_first_process
from lcc_lens.core.metrics import share_recovered
from lcc_lens.core.reading import read_json_lines, read_record, write_record
from lcc_lens.models.pair import Pair
from lcc_lens.restoration.result import RESTORATION_TENSORS, Restoration
from lcc_lens.restoration.training.config import Step
from lcc_lens.restoration.training.lr_range import RangeTest
from lcc_lens.restoration.training.state import CHECKPOINT

RUN_CONFIG = "config.json"
RUN_BEGINNING = "beginning.json"
RUN_METRICS = "metrics.json"
RUN_LOG = "log.jsonl"
_NO_RESUME = "start without --resume"


@dataclass(frozen=True)
class _RangeFile:
    rates: tuple[float, ...]
    losses: tuple[float | None, ...]
    n_steps: int
    start_loss: float


@dataclass(frozen=True)
class _BeginningFile:
    request_sha256: str
    losses: dict[str, float]
    lr_range: _RangeFile | None


@dataclass(frozen=True)
class Beginning:
    """What a run measured before its first step; a resumed one takes it from the folder.

    Args:
        request: the fingerprint of all that decides it.
        losses: of the unrestored models; empty if nothing was measured yet.
        lr_range: losses by learning rate, if one was chosen.
    """

    request: str
    losses: dict[str, float] = field(default_factory=dict)
    lr_range: RangeTest | None = None

    @classmethod
    def read(cls, run: Path, request: str) -> Beginning:
        """What an earlier run of the same request measured; nothing if there is none."""
        file = run / RUN_BEGINNING
        record = read_record(file, _BeginningFile, _NO_RESUME) if file.exists() else None
        if record is None or record.request_sha256 != request:
            return cls(request)
        tested = record.lr_range
        if tested is None:
            return cls(request, record.losses)
        losses = tuple(math.inf if loss is None else loss for loss in tested.losses)
        return cls(request, record.losses, RangeTest(tested.rates, losses, tested.n_steps, tested.start_loss))

    def values(self) -> dict[str, Any]:
        """What the file holds."""
        tested = None if self.lr_range is None else asdict(self.lr_range)
        if self.lr_range is not None and tested is not None:
            tested["losses"] = list(self.lr_range.by_rate.values())
        return {"request_sha256": self.request, "losses": self.losses, "lr_range": tested}


class RunFolder:
    """Writes the scan unless it is there, the settings, one line per optimiser step, the restoration and its losses.

    Nothing is written before the first step or the end: a request that is refused must not touch an earlier run. A
    resumed run drops the lines of steps that it repeats. A run that starts deletes an earlier result with its first
    write, so that an unfinished run has none. Only the first of several processes writes.

    Args:
        path: the folder; without one nothing is written.
        pair: the models, which every file names.
        data: where the training data come from.
        seed: of the run.
        resume: whether the run goes on from its checkpoint.
    """

    def __init__(self, path: str | Path | None, pair: Pair, data: str, seed: int, *, resume: bool) -> None:
        self.root, self.resumes = None if path is None else Path(path), resume
        self._path = self.root if is_first_process() else None
        self._data, self._is_open = data, False
        log = None if self._path is None or not resume else self._path / RUN_LOG
        self._logged = [] if log is None or not log.exists() else read_json_lines(log, Step, _NO_RESUME, torn=True)
        self._scan: Scan | None = None
        self._identity = {
            "dense": pair.dense_id.reference,
            "pruned": pair.pruned_id.reference,
            "dense_sha256": pair.dense_id.sha256,
            "pruned_sha256": pair.pruned_id.sha256,
            "seed": seed,
            "version": package_version(),
        }

    def keep_scan(self, scan: Scan | None) -> None:
        """Note the scan that the restoration is made from: the first write replaces any other scan in the folder."""
        has_scan = self.root is not None and (self.root / SCAN_RECORD).exists()
        if scan is not None and not (has_scan and Scan.load(self.root or "").record == scan.record):
            self._scan = scan

    def beginning(self, request: str) -> Beginning:
        """What the run that is resumed measured before its first step; nothing if this one starts."""
        return Beginning.read(self.root, request) if self.resumes and self.root is not None else Beginning(request)

    def begin(self, settings: dict[str, Any], beginning: Beginning) -> None:
        """Note the settings and what was measured, for the first write."""
        self._config, self._beginning = {"restore": settings, "data": self._data}, beginning

    def add(self, step: Step) -> None:
        """Append a step to the log."""
        if self._path is None:
            return
        self._open(self._path, before=step.step)
        log = self._path / RUN_LOG
        with disk_errors(log), log.open("a", encoding="utf-8") as file:
            file.write(_line(step))

    def finish(self, restoration: Restoration, n_sequences: int) -> None:
        """Write the restoration, and its losses on the held-out sequences."""
        if self._path is None:
            return
        self._open(self._path, before=sys.maxsize)
        restoration.save(self._path)
        losses = restoration.record.losses
        recovered = share_recovered(losses["dense"], losses["pruned"], losses["restored"])
        validation = {"losses": losses, "share_recovered": recovered, "sequences": n_sequences}
        self._write(self._path / RUN_METRICS, {"validation": validation, "heads": len(restoration.heads)})

    def _open(self, path: Path, before: int) -> None:
        """Write the configuration, and the log up to this step if the run goes on from there; once."""
        if self._is_open:
            return
        if not self.resumes:
            for name in (RESTORATION_TENSORS, RUN_METRICS, CHECKPOINT):
                (path / name).unlink(missing_ok=True)
        if self._scan is not None:
            self._scan.save(path)
        self._write(path / RUN_CONFIG, self._config)
        self._write(path / RUN_BEGINNING, self._beginning.values())
        write_text(path / RUN_LOG, "".join(_line(step) for step in self._logged if step.step < before))
        self._is_open = True

    def _write(self, file: Path, values: dict[str, Any]) -> None:
        write_record(file, {**self._identity, **values, "written": time.strftime("%Y-%m-%dT%H:%M:%S%z")})


def _line(step: Step) -> str:
    return json.dumps(asdict(step)) + "\n"
