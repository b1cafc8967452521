"""On-disk state of an unfinished scan, for resuming."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lcc_lens.analysis.selectors.linear_probe import LayerFeatures
from lcc_lens.analysis.statistics import RunningDifferences
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import read_tensors, write_tensors
from lcc_lens.models.hooked.activations import Site

_STATE = "state.safetensors"
#: Head outputs of contrastive pairs that the probes read, in the order of LayerFeatures.
_FEATURES = ("pruned_question", "question", "right", "wrong")


class ScanState:
    """Finished shards of a scan: the sums so far, the probes' activations, and dense activations not yet compared.

    Args:
        folder: where the state is kept; a temporary folder if not given.
        identity: everything that decides the result; the state of a different scan is deleted.
        joined: whether another process has created the state.

    Raises:
        RequestError: the state that another process created is not visible here.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any], *, joined: bool = False) -> None:
        self._temporary = None if folder is not None else tempfile.TemporaryDirectory(prefix="lcc_lens_scan_")
        self.is_kept = folder is not None
        self.folder = folder if folder is not None else Path(cast("Any", self._temporary).name)
        self._identity = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
        self._sums: dict[str, Tensor] = {}
        self.n_done = 0
        self._load(joined=joined)

    def restore(self, sums: Mapping[Site, RunningDifferences]) -> None:
        """Load the sums of the finished shards into ``sums``."""
        if self._sums:
            for site, running in sums.items():
                tensors = {k.removeprefix(f"{site}."): v for k, v in self._sums.items() if k.startswith(f"{site}.")}
                running.restore(tensors)
            self._sums = {}

    def finish(self, sums: Mapping[Site, RunningDifferences], features: Mapping[str, Sequence[Tensor]] | None) -> None:
        """Save one more finished shard: its activations, then the sums that include it."""
        self._keep_features(self.n_done, features)
        self.n_done += 1
        if self.is_kept:
            write_tensors(self.folder / _STATE, _by_name(sums), self._record())

    def begin(self) -> None:
        """Write the identity, which other processes check."""
        if self.is_kept and not (self.folder / _STATE).exists():
            write_tensors(self.folder / _STATE, {"none": torch.zeros(0)}, self._record())

    def has_part(self, shard: int) -> bool:
        """Whether the sums of a shard are saved separately."""
        return (self.folder / self._part_file(shard)).exists()

    def keep_part(
        self,
        shard: int,
        sums: Mapping[Site, RunningDifferences],
        features: Mapping[str, Sequence[Tensor]] | None,
    ) -> None:
        """Save the sums of one shard separately, until all earlier shards are finished."""
        self._keep_features(shard, features)
        write_tensors(self.folder / self._part_file(shard), _by_name(sums))

    def merge_parts(self) -> None:
        """Add separately saved sums to the total in the order of the shards, up to the first missing one."""
        merged = []
        while self.has_part(self.n_done):
            merged.append(self.folder / self._part_file(self.n_done))
            part, _ = read_tensors(merged[-1])
            self._sums = {name: self._sums[name] + t for name, t in part.items()} if self._sums else part
            self.n_done += 1
        if merged:
            write_tensors(self.folder / _STATE, self._sums, self._record())
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
        return (self.folder / self._dense_file(shard)).exists()

    def keep_dense(self, shard: int, parts: Mapping[str, Sequence[Tensor]]) -> None:
        """Save the dense activations of a shard until the pruned model runs."""
        self.begin()
        tensors = {f"{name}.{i}": layer.cpu() for name, layers in parts.items() for i, layer in enumerate(layers)}
        write_tensors(self.folder / self._dense_file(shard), tensors)

    def dense(self, shard: int) -> dict[str, list[Tensor]]:
        """The saved dense activations of a shard: by name, a tensor per layer."""
        tensors, _ = read_tensors(self.folder / self._dense_file(shard))
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
                file = self.folder / f"features_{shard:05d}.safetensors"
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
            write_tensors(self.folder / f"features_{shard:05d}.safetensors", stacked)
        (self.folder / self._dense_file(shard)).unlink(missing_ok=True)

    def _load(self, *, joined: bool) -> None:
        if not self.is_kept:
            return
        try:
            tensors, record = read_tensors(self.folder / _STATE)
        except RequestError:  # missing or damaged: start again
            tensors, record = {}, {}
        if record.get("identity") != self._identity:
            if joined:
                raise RequestError(
                    f"expected the state of the first process's scan in {self.folder}, got none; put the run on a disk "
                    "that all machines share"
                )
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        self.n_done = int(record["n_done"])
        self._sums = tensors if self.n_done else {}

    def _record(self) -> dict[str, str]:
        return {"identity": self._identity, "n_done": str(self.n_done)}

    @staticmethod
    def _dense_file(shard: int) -> str:
        return f"dense_{shard:05d}.safetensors"

    @staticmethod
    def _part_file(shard: int) -> str:
        return f"part_{shard:05d}.safetensors"


def _by_name(sums: Mapping[Site, RunningDifferences]) -> dict[str, Tensor]:
    return {f"{site}.{name}": t.cpu() for site, running in sums.items() for name, t in running.state().items()}
