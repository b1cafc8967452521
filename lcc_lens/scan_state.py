"""A scan that is not through: what is finished lies in a folder, so that the scan can go on and memory stays small."""

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

from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import read_tensors, write_tensors
from lcc_lens.models.hooked.activations import Site
from lcc_lens.selectors.linear_probe import LayerFeatures
from lcc_lens.statistics import RunningDifferences

_STATE = "state.safetensors"
#: The head outputs of contrastive pairs that probes read, in LayerFeatures' order.
_FEATURES = ("pruned_question", "question", "right", "wrong")


class ScanState:
    """Finished shards of a scan: the sums so far, the probes' features, and the dense model's side where it runs first.

    Args:
        folder: where to keep it; a temporary folder, gone at the end, if not given.
        identity: everything that decides the result; the state of another scan is dropped.
        joined: another process keeps the state, and this one adds to it.

    Raises:
        RequestError: what another process keeps is not to be seen here.
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
        """Put the sums of the finished shards in place."""
        if self._sums:
            for site, running in sums.items():
                own = {k.removeprefix(f"{site}."): v for k, v in self._sums.items() if k.startswith(f"{site}.")}
                running.restore(own)
            self._sums = {}

    def finish(self, sums: Mapping[Site, RunningDifferences], features: Mapping[str, Sequence[Tensor]] | None) -> None:
        """Count one more shard as finished, once all of it is on disk."""
        self._keep_features(self.n_done, features)
        self.n_done += 1
        if self.is_kept:
            write_tensors(self.folder / _STATE, _by_name(sums), self._record())

    def begin(self) -> None:
        """Put the identity on disk, where other processes will look for it."""
        if self.is_kept and not (self.folder / _STATE).exists():
            write_tensors(self.folder / _STATE, {"none": torch.zeros(0)}, self._record())

    def has_part(self, shard: int) -> bool:
        """Whether the sums of a shard lie there by themselves."""
        return (self.folder / self._part_file(shard)).exists()

    def keep_part(
        self,
        shard: int,
        sums: Mapping[Site, RunningDifferences],
        features: Mapping[str, Sequence[Tensor]] | None,
    ) -> None:
        """Keep the sums of one shard by themselves, until those of all earlier shards are there."""
        self._keep_features(shard, features)
        write_tensors(self.folder / self._part_file(shard), _by_name(sums))

    def merge_parts(self) -> None:
        """Add the sums of the next shards to those so far, in the order of the shards, as far as they are there."""
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
        """Refuse to end before all shards are there.

        Raises:
            LensError: what another process finished is not to be seen here.
        """
        if self.n_done < n_shards:
            raise LensError(
                f"wanted {n_shards} finished parts of the scan in {self.folder}, got {self.n_done}; put the run on a "
                "disk that all machines share, then run the same command again to go on"
            )

    def has_dense(self, shard: int) -> bool:
        """Whether the dense model's side of a shard is there."""
        return (self.folder / self._dense_file(shard)).exists()

    def keep_dense(self, shard: int, parts: Mapping[str, Sequence[Tensor]]) -> None:
        """Keep the dense model's side of a shard until the pruned model comes."""
        self.begin()
        tensors = {f"{name}.{i}": layer.cpu() for name, layers in parts.items() for i, layer in enumerate(layers)}
        write_tensors(self.folder / self._dense_file(shard), tensors)

    def dense(self, shard: int) -> dict[str, list[Tensor]]:
        """The dense model's side of a shard."""
        tensors, _ = read_tensors(self.folder / self._dense_file(shard))
        names = sorted({key.rsplit(".", 1)[0] for key in tensors})
        n_layers = 1 + max(int(key.rsplit(".", 1)[1]) for key in tensors)
        return {name: [tensors[f"{name}.{i}"] for i in range(n_layers)] for name in names}

    def layers(self, order: Sequence[int], n_layers: int) -> Iterator[LayerFeatures]:
        """The probes' features, one layer in memory at a time.

        Args:
            order: the example behind every row, in the order in which shards were finished.
            n_layers: layers.
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
                        f"wanted {file} as the scan wrote it, got a damaged one; delete {self.folder} and scan again"
                    ) from error
            yield LayerFeatures(*(torch.cat(parts[name])[back].float() for name in _FEATURES))

    def discard(self) -> None:
        """Forget everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> ScanState:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()

    def _keep_features(self, shard: int, features: Mapping[str, Sequence[Tensor]] | None) -> None:
        """Keep a shard's features, and let its dense side go."""
        if features is not None:
            stacked = {name: torch.stack(list(layers)).cpu() for name, layers in features.items()}
            write_tensors(self.folder / f"features_{shard:05d}.safetensors", stacked)
        (self.folder / self._dense_file(shard)).unlink(missing_ok=True)

    def _load(self, *, joined: bool) -> None:
        if not self.is_kept:
            return
        try:
            tensors, record = read_tensors(self.folder / _STATE)
        except RequestError:  # none yet, or damaged: begin anew
            tensors, record = {}, {}
        if record.get("identity") != self._identity:
            if joined:
                raise RequestError(
                    f"wanted the scan that the first process began in {self.folder}, got none of it; put the run on a "
                    "disk that all machines share"
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
