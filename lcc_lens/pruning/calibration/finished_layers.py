"""On-disk state of an unfinished pruning or refit run, for resuming: its finished layers."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import read_sealed, read_tensors, remove_leftovers, write_sealed
from lcc_lens.core.outputs.folders import unfinished_work
from lcc_lens.pruning.methods.pruners import Removed

logger = logging.getLogger(__name__)
_REMOVED = "removed."
_LAYERS = "layer_*.safetensors"
#: Files of earlier versions.
_OLD_FILES = ("run.json", "errors.json")


class FinishedLayers(Mapping[str, Tensor]):
    """New weights by name, stored in one file per finished layer and read on access.

    Hidden states are not stored: running the finished layers again gives the same ones, bit for bit. A file whose
    bytes have changed counts as missing.

    Args:
        out: the output directory; the layers lie in a hidden folder beside it.
        request: fingerprint of the request; layers of another request are deleted.
    """

    def __init__(self, out: Path, request: str) -> None:
        self.folder = unfinished_work(out)
        self._request = request
        self._layer_of: dict[str, int] = {}
        self._n = 0
        #: What was noted of the finished layers, by name.
        self.notes: dict[str, float] = {}
        while (file := self._file(self._n)).exists():
            try:
                tensors, metadata = read_sealed(file)
            except RequestError as error:
                logger.warning("layer %d and the later ones are computed again: %s", self._n, error)
                break
            if (metadata.get("request"), metadata.get("layer")) != (request, str(self._n)):
                logger.warning("starting again: the unfinished layers in %s are of another request", self.folder)
                self.discard()
                break
            self._register(tensors, json.loads(metadata["notes"]))

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

    def add(self, weights: Mapping[str, Tensor], removed: Removed, notes: Mapping[str, float] | None = None) -> None:
        """Write the next layer, with numbers to note; it counts as finished once its file is complete."""
        tensors = {**weights, **{f"{_REMOVED}{name}": value for name, value in vars(removed).items()}}
        metadata = {"request": self._request, "layer": str(self._n), "notes": json.dumps(notes or {})}
        write_sealed(self._file(self._n), tensors, metadata)
        self._register(tensors, notes or {})

    def discard(self) -> None:
        """Delete all layers, and their folder if it holds nothing else."""
        if self.folder.is_dir():
            remove_leftovers(self.folder)
            for file in [*self.folder.glob(_LAYERS), *(self.folder / name for name in _OLD_FILES)]:
                file.unlink(missing_ok=True)
            with suppress(OSError):  # files of others
                self.folder.rmdir()
        self._layer_of, self._n, self.notes = {}, 0, {}

    def _register(self, tensors: Mapping[str, Tensor], notes: Mapping[str, float]) -> None:
        self._layer_of.update({name: self._n for name in tensors if not name.startswith(_REMOVED)})
        self.notes.update(notes)
        self._n += 1

    def _file(self, index: int) -> Path:
        return self.folder / f"layer_{index:04d}.safetensors"
