"""One reader of a model on disk: its configuration, tensors, shapes and hash."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import sha256_file
from lcc_lens.core.reading import read_json

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_INDEX = "model.safetensors.index.json"
#: Notes about a checkpoint that would be untrue of a copy with other weights.
_NOTES = ("README.md", "pruning.json", "converted.json")
_SIDE_FILES = (".json", ".jinja", ".txt", ".model")


class StoredTensor(NamedTuple):
    """Where a tensor lies, and what the header of its file says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """The format in safetensors' words, such as ``BF16``."""


@dataclass(frozen=True)
class Checkpoint:
    """A model in a Hugging Face directory with safetensors.

    Every property is read from disk when it is first used, and kept: make a new object once the files have changed.

    Example:
        >>> Checkpoint(Path("out/wanda50")).tensors["model.norm.weight"].shape  # doctest: +SKIP
        (576,)
    """

    path: Path

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The entries of ``config.json``.

        Raises:
            RequestError: the file is missing or is not JSON.
        """
        config: Mapping[str, Any] = read_json(self.path / "config.json")
        return config

    @cached_property
    def weight_files(self) -> tuple[Path, ...]:
        """The safetensors files that hold the weights, in name order."""
        index = self.path / WEIGHTS_INDEX
        if index.exists():
            files = [self.path / name for name in sorted(set(read_json(index)["weight_map"].values()))]
        else:
            files = sorted(self.path.glob("model*.safetensors"))
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise RequestError(
                f"expected every shard of {self.path}, got none named {missing[0]}; fetch the checkpoint again"
            )
        if not files:
            pickles = sorted(file.name for file in self.path.glob("*.bin"))
            hint = f"got the pickle {pickles[0]}; convert it to safetensors first" if pickles else "got none"
            raise RequestError(f"expected model.safetensors in {self.path}, {hint}")
        return tuple(files)

    @property
    def side_files(self) -> tuple[Path, ...]:
        """Tokenizer, templates and configuration: what belongs to a copy, without weights, code and our own notes."""
        files = (file for file in sorted(self.path.iterdir()) if file.suffix in _SIDE_FILES and file.is_file())
        return tuple(file for file in files if file.name not in _NOTES)

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every stored tensor by name, from the headers of the weight files alone."""
        from safetensors import SafetensorError, safe_open

        tensors: dict[str, StoredTensor] = {}
        for file in self.weight_files:
            try:
                with safe_open(file, framework="pt") as handle:
                    for name in handle.keys():
                        header = handle.get_slice(name)
                        tensors[name] = StoredTensor(file, tuple(header.get_shape()), header.get_dtype())
            except SafetensorError as error:
                raise RequestError(
                    f"expected a safetensors file in {file}, got a damaged one ({error}); fetch it again"
                ) from error
        return tensors

    @property
    def sha256(self) -> str:
        """The SHA-256 that identifies the weights, computed once per process and state of the files.

        For a single ``model.safetensors`` it is that file's own hash; for shards, the hash of their hashes in name
        order.
        """
        stats = [(file, file.stat()) for file in self.weight_files]
        return _sha256_of_state(tuple((file, stat.st_mtime_ns, stat.st_size) for file, stat in stats))

    @property
    def n_bytes(self) -> int:
        """The size of the weight files on disk."""
        return sum(file.stat().st_size for file in self.weight_files)

    def require_whole(self) -> None:
        """Refuse a directory without a configuration or with a weight file missing.

        Raises:
            RequestError: says what is missing.
        """
        _ = self.config, self.weight_files

    def stored_name(self, name: str) -> str:
        """A tensor's name in the files: as the model has it, or without the base model's prefix (original GPT-2)."""
        short = name.partition(".")[2]
        return short if name not in self.tensors and short in self.tensors else name

    def read(self, name: str) -> Tensor:
        """Read one tensor, in its stored layout and format."""
        from safetensors import safe_open

        if name not in self.tensors:
            raise RequestError(
                f"expected the tensor {name} in {self.path}, got none of that name; the layout is not supported"
            )
        with safe_open(self.tensors[name].file, framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
        return tensor


@functools.cache
def _sha256_of_state(state: tuple[tuple[Path, int, int], ...]) -> str:
    """The hash of weight files, by path, time of change and size."""
    digests = [sha256_file(file) for file, _, _ in state]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
