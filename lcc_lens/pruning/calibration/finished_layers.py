"""On-disk state of an unfinished pruning or refit run, for resuming: its finished layers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import read_tensors, write_json, write_tensors
from lcc_lens.core.reading import read_json
from lcc_lens.pruning.methods.pruners import Removed

_IDENTITY = "run.json"
_REMOVED = "removed."


class FinishedLayers(Mapping[str, Tensor]):
    """New weights by name, stored in one file per finished layer and read on access.

    Hidden states are not stored: running the finished layers again gives the same ones, bit for bit.

    Args:
        out: the output directory; the layers lie in a hidden folder beside it.
        request: fingerprint of the request; layers of another request are deleted.
    """

    def __init__(self, out: Path, request: str) -> None:
        self.folder = out.resolve().parent / f".{out.resolve().name}.unfinished"
        self._request = request
        self._layer_of: dict[str, int] = {}
        self._n = 0
        if not self._is_same_request():
            self.discard()
        while (file := self._file(self._n)).exists():
            try:
                self._register(read_tensors(file)[0])
            except RequestError:  # a damaged file: this layer and the later ones are computed again
                break

    def __len__(self) -> int:
        return len(self._layer_of)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layer_of)

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._file(self._layer_of[name]), framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
        return tensor

    @property
    def n_layers(self) -> int:
        """How many layers are finished, counted from the first."""
        return self._n

    def layer(self, index: int) -> dict[str, Tensor]:
        """All new weights of a finished layer."""
        tensors, _ = read_tensors(self._file(index))
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(_REMOVED)}

    def removed(self, index: int) -> Removed:
        """The heads and neurons removed from a finished layer."""
        from safetensors import safe_open

        with safe_open(self._file(index), framework="pt") as handle:  # reads no weights, which are large
            names = [name for name in handle.keys() if name.startswith(_REMOVED)]
            return Removed(**{name.removeprefix(_REMOVED): handle.get_tensor(name) for name in names})

    def add(self, weights: Mapping[str, Tensor], removed: Removed) -> None:
        """Write the next layer; it counts as finished once its file is complete."""
        if self._n == 0:
            write_json(self.folder / _IDENTITY, {"identity": self._request})
        tensors = {**weights, **{f"{_REMOVED}{name}": value for name, value in vars(removed).items()}}
        write_tensors(self._file(self._n), tensors)
        self._register(tensors)

    def discard(self) -> None:
        """Delete all layers."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._layer_of, self._n = {}, 0

    def _register(self, tensors: Mapping[str, Tensor]) -> None:
        self._layer_of.update({name: self._n for name in tensors if not name.startswith(_REMOVED)})
        self._n += 1

    def _file(self, index: int) -> Path:
        return self.folder / f"layer_{index:04d}.safetensors"

    def _is_same_request(self) -> bool:
        try:
            return bool(read_json(self.folder / _IDENTITY)["identity"] == self._request)
        except (RequestError, KeyError, TypeError):
            return False
