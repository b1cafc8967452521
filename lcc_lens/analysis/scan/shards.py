"""The passes of a scan in the order in which they are run: shard by shard, alone or divided among processes."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lcc_lens.analysis.scan.passes import ScanPlan, dense_pass, pruned_pass, running_sums
from lcc_lens.analysis.selectors.linear_probe import LayerFeatures
from lcc_lens.analysis.statistics import RunningDifferences
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import read_tensors, write_tensors
from lcc_lens.core.memory import trim_heap
from lcc_lens.core.processes import is_first_process, own_part
from lcc_lens.models.hooked.activations import Site
from lcc_lens.models.pair import Pair

Sums = dict[Site, RunningDifferences]


@dataclass
class ScanWork:
    """The passes still to come, batch by batch; everything finished lies in the state.

    Args:
        pair: the models.
        plan: what is read where.
        spectra: the sites whose singular values are wanted.
        state: what is finished.
        is_divided: whether processes that were launched together share the work. Each takes every n-th shard and keeps
            its sums on disk; the first process adds them in the order of the shards, as one process does.
    """

    pair: Pair
    plan: ScanPlan
    spectra: Sequence[Site]
    state: ScanState
    is_divided: bool = False

    def __post_init__(self) -> None:
        if not self.is_divided or is_first_process():
            self.state.merge_parts()
        self.shards = self.plan.shards()
        every = range(len(self.shards))
        own = own_part(every) if self.is_divided else every
        self.to_come = [i for i in own if i >= self.state.n_done and not (self.is_divided and self.state.has_part(i))]
        self.sums: Sums = {}

    def n_batches(self) -> int:
        """How many batches are to come in this process."""
        dense = sum(len(self.plan.dense_batches(self.shards[i])) for i in self._dense_to_come())
        return dense + sum(len(self.plan.pruned_batches(self.shards[i])) for i in self.to_come)

    def batches(self) -> Iterator[None]:
        """Do the work; yields after every batch. One model at a time runs over everything before the other."""
        if self.pair.one_at_a_time:
            for number in self._dense_to_come():
                self.state.keep_dense(number, (yield from dense_pass(self.pair, self.plan, self.shards[number])))
        if self.is_divided:
            yield from self._own_shards()
        else:
            yield from self._all_shards()

    def whole_sums(self) -> Sums:
        """The sums over all shards, once all are finished."""
        if self.is_divided:
            self.state.merge_parts()
            self.state.require_done(len(self.shards))
            self.sums = self._empty()
            self.state.restore(self.sums)
        return self.sums

    def layers(self) -> Iterator[LayerFeatures]:
        """The probes' features, in the order of the examples."""
        return self.state.layers([i for shard in self.shards for i in shard], self.pair.n_layers)

    def _all_shards(self) -> Generator[None, None, None]:
        """Add one shard after the other."""
        self.sums = self._empty()
        self.state.restore(self.sums)
        for number in self.to_come:
            self.state.finish(self.sums, (yield from self._shard(number, self.sums)))
            trim_heap()

    def _own_shards(self) -> Generator[None, None, None]:
        """Keep the sums of each of this process's shards by themselves."""
        for number in self.to_come:
            sums = self._empty()
            self.state.keep_part(number, sums, (yield from self._shard(number, sums)))
            del sums
            trim_heap()
            if is_first_process():
                self.state.merge_parts()

    def _shard(self, number: int, sums: Sums) -> Generator[None, None, Mapping[str, Sequence[Tensor]] | None]:
        """Both models over a shard; gives the probes' features where there are wrong answers."""
        shard = self.shards[number]
        dense: dict[str, list[Tensor]]
        if self.pair.one_at_a_time:
            dense = self.state.dense(number)
        else:
            dense = yield from dense_pass(self.pair, self.plan, shard)
        question = yield from pruned_pass(self.pair, self.plan, shard, dense, sums)
        if question is None:
            return None
        return {"pruned_question": question, **{name: dense[name] for name in ("question", "right", "wrong")}}

    def _empty(self) -> Sums:
        return running_sums(self.pair.pruned, self.plan.sites, self.spectra)

    def _dense_to_come(self) -> list[int]:
        return [i for i in self.to_come if not (self.pair.one_at_a_time and self.state.has_dense(i))]


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
                f"expected {n_shards} finished parts of the scan in {self.folder}, got {self.n_done}; put the run on a "
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
                        f"expected {file} as the scan wrote it, got a damaged one; delete {self.folder} and scan again"
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
                    f"expected the scan that the first process began in {self.folder}, got none of it; put the "
                    f"run on a "
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
