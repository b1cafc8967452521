"""The finished layers of a pruning run that is not through: kept beside the output, so that it can go on there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import read_json, read_tensors, write_json, write_tensors
from lcc_lens.pruning.methods.pruners import Removed

_IDENTITY = "run.json"
_REMOVED = "removed."


class FinishedLayers(Mapping[str, Tensor]):
    """Pruned weights by name, layer by layer on disk; only what is asked for is in memory.

    Hidden states are not kept: running the finished layers again gives the same ones, bit for bit.

    Args:
        out: the output directory; the layers lie in a hidden folder beside it.
        identity: everything that decides the result. Layers of another request are dropped.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.folder = out.resolve().parent / f".{out.resolve().name}.unfinished"
        self._identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._where: dict[str, int] = {}
        self._n = 0
        if not self._is_same_run():
            self.discard()
        while (file := self._file(self._n)).exists():
            try:
                self._note(read_tensors(file)[0])
            except RequestError:  # a disk that lost what it had taken: that layer and the later ones are made again
                break

    def __len__(self) -> int:
        return len(self._where)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._file(self._where[name]), framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
        return tensor

    @property
    def n_layers(self) -> int:
        """How many layers are finished, counted from the first."""
        return self._n

    def layer(self, index: int) -> dict[str, Tensor]:
        """All pruned weights of a finished layer."""
        tensors, _ = read_tensors(self._file(index))
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(_REMOVED)}

    def removed(self, index: int) -> Removed:
        """What a finished layer lost as a whole."""
        from safetensors import safe_open

        with safe_open(self._file(index), framework="pt") as handle:  # not the weights, which are large
            names = [name for name in handle.keys() if name.startswith(_REMOVED)]
            return Removed(**{name.removeprefix(_REMOVED): handle.get_tensor(name) for name in names})

    def add(self, weights: Mapping[str, Tensor], removed: Removed) -> None:
        """Keep the next layer; it counts as finished once it is wholly on disk."""
        if self._n == 0:
            write_json(self.folder / _IDENTITY, {"identity": self._identity})
        tensors = {**weights, **{f"{_REMOVED}{name}": value for name, value in vars(removed).items()}}
        write_tensors(self._file(self._n), tensors)
        self._note(tensors)

    def discard(self) -> None:
        """Forget everything."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._where, self._n = {}, 0

    def _note(self, tensors: Mapping[str, Tensor]) -> None:
        self._where.update({name: self._n for name in tensors if not name.startswith(_REMOVED)})
        self._n += 1

    def _file(self, index: int) -> Path:
        return self.folder / f"layer_{index:04d}.safetensors"

    def _is_same_run(self) -> bool:
        try:
            return bool(read_json(self.folder / _IDENTITY)["identity"] == self._identity)
        except (RequestError, KeyError, TypeError):
            return False
