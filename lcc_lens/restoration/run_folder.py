"""The files of a restoration's run: what was asked, every step, what came of it."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lcc_lens.core.config import package_version
from lcc_lens.core.files import disk_errors, read_json, write_json, write_text
from lcc_lens.core.metrics import share_recovered
from lcc_lens.core.processes import is_first_process
from lcc_lens.models.pair import Pair
from lcc_lens.restoration.result import Restoration
from lcc_lens.restoration.training.loop import Step
from lcc_lens.restoration.training.lr_range import RangeTest

RUN_CONFIG = "config.json"
RUN_BEGINNING = "beginning.json"
RUN_METRICS = "metrics.json"
RUN_LOG = "log.jsonl"


@dataclass(frozen=True)
class Beginning:
    """What a run measured before its first step; a resumed one takes it from the folder.

    ``losses`` are those of the bare models, ``request`` a text that decides all of it.
    """

    request: str
    losses: dict[str, float]
    lr_range: RangeTest | None = None

    @classmethod
    def read(cls, run: Path, request: str) -> Beginning | None:
        """What an earlier run of the same request measured; None if there is none."""
        file = run / RUN_BEGINNING
        record = read_json(file) if file.exists() else {}
        if record.get("request_sha256") != _sha256(request):
            return None
        tested = record["lr_range"]
        if tested is not None:
            losses = tuple(math.inf if loss is None else loss for loss in tested["losses"])
            tested = RangeTest(tuple(tested["rates"]), losses, tested["n_steps"], tested["start_loss"])
        return cls(request, record["losses"], tested)

    def values(self) -> dict[str, Any]:
        """What the file holds."""
        tested = None if self.lr_range is None else asdict(self.lr_range)
        if self.lr_range is not None and tested is not None:
            tested["losses"] = list(self.lr_range.by_rate.values())
        return {"request_sha256": _sha256(self.request), "losses": self.losses, "lr_range": tested}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class RunFolder:
    """Writes ``config.json``, one line per optimiser step in ``log.jsonl``, the restoration and ``metrics.json``.

    Nothing is written before the first step or the end: what cannot be resumed must not touch an earlier run. A resumed
    run drops the lines of steps that it repeats. Only the first of several processes writes.

    Args:
        path: the folder; without one nothing is written.
        pair: the models, which every file names.
        settings: what was asked.
        data: where the training data come from.
        beginning: what was measured before the first step.
        resume: whether the log goes on.
    """

    def __init__(
        self,
        path: Path | None,
        pair: Pair,
        settings: dict[str, Any],
        data: str,
        beginning: Beginning,
        seed: int,
        *,
        resume: bool,
    ) -> None:
        self.path = path if is_first_process() else None
        self._beginning = beginning
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
        self._open(self.path, before=sys.maxsize)
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
        self._write(path / RUN_BEGINNING, self._beginning.values())
        write_text(path / RUN_LOG, "".join(line + "\n" for line in self._kept_lines(path / RUN_LOG, before)))
        self._is_open = True

    def _kept_lines(self, log: Path, before: int) -> list[str]:
        if not (self._resume and log.exists()):
            return []
        lines = log.read_text(encoding="utf-8").splitlines()
        return [line for line in lines if line.endswith("}") and json.loads(line)["step"] < before]  # one may be torn

    def _write(self, file: Path, values: dict[str, Any]) -> None:
        write_json(file, {**self._identity, **values, "written": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
