"""The files of a restoration's run: what was asked, every step, what came of it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lcc_lens.config import package_version
from lcc_lens.files import disk_errors, write_json, write_text
from lcc_lens.metrics import share_recovered
from lcc_lens.pair import Pair
from lcc_lens.restoration import Restoration
from lcc_lens.training import Step

RUN_CONFIG = "config.json"
RUN_METRICS = "metrics.json"
RUN_LOG = "log.jsonl"


class RunFolder:
    """Writes ``config.json``, one line per optimiser step in ``log.jsonl``, the restoration and ``metrics.json``.

    Nothing is written before the first step or the end: what cannot be resumed must not touch an earlier run. A resumed
    run drops the lines of steps that it repeats.

    Args:
        path: the folder; without one nothing is written.
        pair: the models, which every file names.
        settings: what was asked.
        data: where the training data come from.
        resume: whether the log goes on.
    """

    def __init__(
        self, path: Path | None, pair: Pair, settings: dict[str, Any], data: str, seed: int, *, resume: bool
    ) -> None:
        self.path = path
        self._config = {"restore": settings, "data": data}
        self._identity = {
            "dense": pair.dense_id.reference,
            "pruned": pair.pruned_id.reference,
            "dense_sha256": pair.dense_id.sha256,
            "pruned_sha256": pair.pruned_id.sha256,
            "seed": seed,
            "version": package_version(),
        }
        self._resume = resume
        self._is_open = False

    def add(self, step: Step) -> None:
        """Append a step to the log."""
        if self.path is None:
            return
        self._open(self.path, before=step.step)
        log = self.path / RUN_LOG
        with disk_errors(log), log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(step)) + "\n")

    def finish(self, restoration: Restoration, n_sequences: int) -> None:
        """Write the restoration and its numbers on the held-out sequences."""
        if self.path is None:
            return
        self._open(self.path, before=1)
        restoration.save(self.path)
        losses = restoration.record.losses
        recovered = share_recovered(losses["dense"], losses["pruned"], losses["restored"])
        validation = {"losses": losses, "share_recovered": recovered, "sequences": n_sequences}
        self._write(self.path / RUN_METRICS, {"validation": validation, "heads": len(restoration.heads)})

    def _open(self, path: Path, before: int) -> None:
        """Write the configuration, and the log up to this step if the run goes on from there; once."""
        if self._is_open:
            return
        self._write(path / RUN_CONFIG, self._config)
        write_text(path / RUN_LOG, "".join(line + "\n" for line in self._kept_lines(path / RUN_LOG, before)))
        self._is_open = True

    def _kept_lines(self, log: Path, before: int) -> list[str]:
        if not (self._resume and log.exists()):
            return []
        return [line for line in log.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] < before]

    def _write(self, file: Path, values: dict[str, Any]) -> None:
        write_json(file, {**self._identity, **values, "written": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
