"""On-disk state of an unfinished scan, for resuming."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lcc_lens.analysis.head_scores import HeadScores
from lcc_lens.analysis.scan.sums import ScanSums
from lcc_lens.analysis.selectors.evidence import ScoreSettings
from lcc_lens.analysis.selectors.linear_probe import LayerFeatures
from lcc_lens.analysis.selectors.names import SELECTORS
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import read_sealed, write_sealed
from lcc_lens.core.fingerprint import fingerprint

logger = logging.getLogger(__name__)
_STATE = "state.safetensors"
#: Head outputs of contrastive pairs that the probes read, in the order of LayerFeatures.
_FEATURES = ("pruned_question", "question", "right", "wrong")


class ScanState:
    """What of a scan is finished: sums of shards, the probes' and not yet compared dense activations, and scores.

    Args:
        folder: where the state is kept; a temporary folder if not given.
        request: fingerprint of everything that decides the result; the state of a different scan is deleted, and so is
            a file whose bytes have changed.
        joined: whether another process has created the state.
        replaces: the record of an earlier scan, which goes once this one has begun: an unfinished scan has none.

    Raises:
        RequestError: the state that another process created is not visible here.
    """

    def __init__(
        self, folder: Path | None, request: str, *, joined: bool = False, replaces: Path | None = None
    ) -> None:
        self._temporary = None if folder is not None else tempfile.TemporaryDirectory(prefix="lcc_lens_scan_")
        self.is_kept = folder is not None
        self.folder = folder if folder is not None else Path(cast("Any", self._temporary).name)
        self._request = request
        self._sums: dict[str, Tensor] = {}
        self._replaces = replaces
        #: Files that this process wrote or checked.
        self._whole: set[str] = set()
        self.n_done = 0
        self._load(joined=joined)

    def restore(self, sums: ScanSums) -> None:
        """Load the sums of the finished shards into ``sums``."""
        if self._sums:
            sums.restore(self._sums)
            self._sums = {}

    def finish(self, sums: ScanSums, features: Mapping[str, Sequence[Tensor]] | None) -> None:
        """Save one more finished shard: its activations, then the sums that include it."""
        self._keep_features(self.n_done, features)
        self.n_done += 1
        if self.is_kept:
            self._write_state(sums.state())

    def begin(self) -> None:
        """Write the request's fingerprint, which other processes check."""
        if self.is_kept and not (self.folder / _STATE).exists():
            self._write_state({"none": torch.zeros(0)})

    def has_part(self, shard: int) -> bool:
        """Whether the sums of a shard are saved separately."""
        return self._is_whole(self._part_file(shard))

    def keep_part(self, shard: int, sums: ScanSums, features: Mapping[str, Sequence[Tensor]] | None) -> None:
        """Save the sums of one shard separately, until all earlier shards are finished."""
        self._keep_features(shard, features)
        self._write(self._part_file(shard), sums.state())

    def merge_parts(self) -> None:
        """Add separately saved sums to the total in the order of the shards, up to the first missing one."""
        merged = []
        while self.has_part(self.n_done):
            merged.append(self.folder / self._part_file(self.n_done))
            part, _ = read_sealed(merged[-1])
            self._sums = {name: self._sums[name] + t for name, t in part.items()} if self._sums else part
            self.n_done += 1
        if merged:
            self._write_state(self._sums)
        for file in merged:
            file.unlink()

    def require_done(self, n_shards: int) -> None:
        """Check that all shards are finished."""
        if self.n_done < n_shards:
            raise LensError(
                f"expected {n_shards} finished parts of the scan in {self.folder}, got {self.n_done}; put the run on a "
                "disk that all machines share, then run the same command again to go on"
            )

    def has_dense(self, shard: int) -> bool:
        """Whether the dense activations of a shard are saved."""
        return self._is_whole(self._dense_file(shard))

    def keep_dense(self, shard: int, parts: Mapping[str, Sequence[Tensor]]) -> None:
        """Save the dense activations of a shard until the pruned model runs."""
        self.begin()
        tensors = {f"{name}.{i}": layer.cpu() for name, layers in parts.items() for i, layer in enumerate(layers)}
        self._write(self._dense_file(shard), tensors)

    def dense(self, shard: int) -> dict[str, list[Tensor]]:
        """The saved dense activations of a shard: by name, a tensor per layer."""
        tensors, _ = read_sealed(self.folder / self._dense_file(shard))
        names = sorted({key.rsplit(".", 1)[0] for key in tensors})
        n_layers = 1 + max(int(key.rsplit(".", 1)[1]) for key in tensors)
        return {name: [tensors[f"{name}.{i}"] for i in range(n_layers)] for name in names}

    def layers(self, order: Sequence[int], n_layers: int) -> Iterator[LayerFeatures]:
        """The probes' activations, one layer in memory at a time.

        Args:
            order: the example of every row, in the order in which shards were finished.
        """
        from safetensors import SafetensorError, safe_open

        back = torch.tensor(order).argsort()
        for layer in range(n_layers):
            parts: dict[str, list[Tensor]] = {name: [] for name in _FEATURES}
            for shard in range(self.n_done):
                file = self.folder / self._features_file(shard)
                try:
                    with safe_open(file, framework="pt") as handle:
                        for name in _FEATURES:
                            parts[name].append(handle.get_slice(name)[layer])
                except (OSError, SafetensorError) as error:
                    raise LensError(
                        f"expected {file} as the scan wrote it, got a missing or damaged file; "
                        f"delete {self.folder} and scan again"
                    ) from error
            yield LayerFeatures(*(torch.cat(parts[name])[back].float() for name in _FEATURES))

    def scores(self, selector: str, settings: ScoreSettings) -> HeadScores | None:
        """The scores that a selector with these settings gave; None if it has not finished."""
        name = self._scores_file(selector, settings)
        if not self._is_whole(name):
            return None
        tensors, record = read_sealed(self.folder / name)
        return HeadScores(
            selector, **tensors, n_examples=int(record["n_examples"]), settings=json.loads(record["settings"])
        )

    def keep_scores(self, settings: ScoreSettings, scores: HeadScores) -> None:
        """Save a finished selector's scores, if it is one whose name says what it computes."""
        if self.is_kept and scores.selector in SELECTORS:
            record = {"n_examples": str(scores.n_examples), "settings": json.dumps(scores.settings)}
            tensors = {"value": scores.value, "stderr": scores.stderr}
            self._write(self._scores_file(scores.selector, settings), tensors, record)

    def discard(self) -> None:
        """Delete the state."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> ScanState:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()

    def _keep_features(self, shard: int, features: Mapping[str, Sequence[Tensor]] | None) -> None:
        """Save a shard's probe activations and delete its dense activations."""
        if features is not None:
            stacked = {name: torch.stack(list(layers)).cpu() for name, layers in features.items()}
            self._write(self._features_file(shard), stacked)
        (self.folder / self._dense_file(shard)).unlink(missing_ok=True)

    def _load(self, *, joined: bool) -> None:
        if not self.is_kept:
            return
        try:
            tensors, record = read_sealed(self.folder / _STATE)
        except RequestError as error:  # start again
            tensors, record = {}, {}
            if (self.folder / _STATE).exists():
                logger.warning("scanning from the start: %s", error)
        if record.get("identity") != self._request:
            if joined:
                raise RequestError(
                    f"expected the state of the first process's scan in {self.folder}, got none; put the run on a disk "
                    "that all machines share"
                )
            if record:
                logger.warning("scanning from the start: the unfinished scan in %s is of another request", self.folder)
            self.discard()
            return
        features = [self._features_file(shard) for shard in range(int(record["n_done"]))]
        if any((self.folder / name).exists() and not self._is_whole(name) for name in features):
            self.discard()
            return
        self.n_done = int(record["n_done"])
        self._sums = tensors if self.n_done else {}

    def _is_whole(self, name: str) -> bool:
        """Whether a file is there as this scan wrote it; a changed one is deleted."""
        file = self.folder / name
        if name not in self._whole and file.exists():
            try:
                if read_sealed(file)[1].get("identity") == self._request:
                    self._whole.add(name)
                else:
                    file.unlink()
            except RequestError as error:
                logger.warning("computing a part of the scan again: %s", error)
                file.unlink()
        return name in self._whole and file.exists()

    def _write(self, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, str] | None = None) -> None:
        write_sealed(self.folder / name, tensors, {"identity": self._request, **(record or {})})
        self._whole.add(name)

    def _write_state(self, tensors: Mapping[str, Tensor]) -> None:
        if self._replaces is not None:
            self._replaces.unlink(missing_ok=True)
        write_sealed(self.folder / _STATE, tensors, {"identity": self._request, "n_done": str(self.n_done)})

    @staticmethod
    def _features_file(shard: int) -> str:
        return f"features_{shard:05d}.safetensors"

    @staticmethod
    def _dense_file(shard: int) -> str:
        return f"dense_{shard:05d}.safetensors"

    @staticmethod
    def _part_file(shard: int) -> str:
        return f"part_{shard:05d}.safetensors"

    @staticmethod
    def _scores_file(selector: str, settings: ScoreSettings) -> str:
        return f"scores_{selector}_{fingerprint(settings)[:16]}.safetensors"
