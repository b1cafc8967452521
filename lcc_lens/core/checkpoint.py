"""One reader of a model on disk: its configuration, tensors, shapes and hash."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import sha256_file
from lcc_lens.core.reading import read_json
from lcc_lens.core.side_files import settings_files

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = f"{WEIGHTS}.index.json"
#: What transformers would read before ``model.safetensors``: one process's part of a divided model.
_DIVIDED = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")
#: Files beside the weights that say these are quantised, whatever ``config.json`` says.
_QUANTISED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
#: Entries of ``config.json`` that say the weights are quantised.
_QUANTISED_ENTRIES = ("quantization_config", "compression_config")

_FETCH = "fetch the checkpoint again"


@dataclass(frozen=True)
class _Index:
    """What of ``model.safetensors.index.json`` counts: the shard of every tensor, and what transformers asks for."""

    weight_map: dict[str, str]
    metadata: Any = None


class StoredTensor(NamedTuple):
    """A stored tensor's file, and its shape and format from the file's header."""

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
            RequestError: the file is missing or holds no JSON object.
        """
        if not (self.path / "config.json").is_file():
            raise RequestError(
                f"expected a Hugging Face model in {self.path}, got no config.json there; check the path"
            )
        config = read_json(self.path / "config.json", advice=_FETCH)
        if not isinstance(config, dict):
            raise RequestError(f"expected an object in {self.path / 'config.json'}, got another value; {_FETCH}")
        return config

    @cached_property
    def weight_files(self) -> tuple[Path, ...]:
        """The safetensors files that hold the weights, as transformers chooses them: one file, or an index's shards.

        Raises:
            RequestError: none, one missing, one named by a path, or two models of which one would have to be chosen.
        """
        shards = tuple(sorted(set(self._index.weight_map.values())))
        if any(_DIVIDED.fullmatch(file.name) for file in self.path.iterdir()):
            raise RequestError(f"expected a whole model in {self.path}, got the parts of a divided one; save it whole")
        if (self.path / WEIGHTS).is_file():
            if any(name != WEIGHTS and (self.path / name).exists() for name in shards):
                raise RequestError(
                    f"expected one model in {self.path}, got {WEIGHTS} and an index with shards of its own; "
                    "delete what does not belong"
                )
            return (self.path / WEIGHTS,)
        missing = [name for name in shards if not (self.path / name).is_file()]
        if missing:
            raise RequestError(
                f"expected every shard of {self.path}, got none named {missing[0]}; fetch the checkpoint again"
            )
        if not shards:
            raise RequestError(f"expected {WEIGHTS} in {self.path}, {self._other_weights()}")
        if not isinstance(self._index.metadata, dict):
            raise RequestError(
                f"expected the object 'metadata' in {self.path / WEIGHTS_INDEX}, as transformers does, got none; "
                'add "metadata": {} to it'
            )
        return tuple(self.path / name for name in shards)

    @cached_property
    def _index(self) -> _Index:
        """The index of shards; an empty one if there is none."""
        file = self.path / WEIGHTS_INDEX
        index = read_json(file, _Index, _FETCH) if file.exists() else _Index({})
        for name in index.weight_map.values():
            if re.search(r"[/\\\0]", name) or not name.endswith(".safetensors"):
                raise RequestError(
                    f"expected names of safetensors files beside {file}, got {name!r}; correct the index"
                )
        return index

    def _other_weights(self) -> str:
        """What lies there in place of the weights, in words."""
        pickles, others = (sorted(self.path.glob(pattern)) for pattern in ("*.bin", "*.safetensors"))
        if pickles:
            return f"got the pickle {pickles[0].name}; convert it to safetensors first"
        if others:
            return f"got {others[0].name} and no index; rename it, or fetch {WEIGHTS_INDEX}"
        return "got none"

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every stored tensor by name, from the headers of the weight files alone.

        Raises:
            RequestError: a damaged file, a name in two files, or an index that lists other tensors.
        """
        tensors: dict[str, StoredTensor] = {}
        for name, stored in self._headers():
            if name in tensors:
                raise RequestError(
                    f"expected every tensor once in {self.path}, got {name} in {tensors[name].file.name} and "
                    f"{stored.file.name}; fetch the checkpoint again"
                )
            tensors[name] = stored
        if self.weight_files[0].name != WEIGHTS:
            listed = set(self._index.weight_map.items())
            held = {(name, stored.file.name) for name, stored in tensors.items()}
            for name, file in sorted(listed ^ held):
                place = "in the index alone" if (name, file) in listed else f"in {file}, unknown to the index"
                raise RequestError(
                    f"expected the tensors that {self.path / WEIGHTS_INDEX} lists, got {name} {place}; "
                    "fetch the checkpoint again"
                )
        return tensors

    def _headers(self) -> Iterator[tuple[str, StoredTensor]]:
        from safetensors import SafetensorError, safe_open

        for file in self.weight_files:
            try:
                with safe_open(file, framework="pt") as handle:
                    for name in handle.keys():
                        header = handle.get_slice(name)
                        yield name, StoredTensor(file, tuple(header.get_shape()), header.get_dtype())
            except (SafetensorError, OSError) as error:
                raise RequestError(
                    f"expected a safetensors file in {file}, got a damaged one ({error}); fetch it again"
                ) from error

    @property
    def sha256(self) -> str:
        """The SHA-256 that identifies the weights, computed once per process and state of the files.

        For a single ``model.safetensors`` it is that file's own hash; for shards, the hash of their hashes in name
        order.
        """
        return _sha256_of_state(tuple(self.weight_files), self.state)

    @property
    def state(self) -> tuple[tuple[int, ...], ...]:
        """Identity, times and size of the weight files and ``config.json``: what changes when any of them does."""
        files = (*self.weight_files, self.path / "config.json")
        stats = (file.stat() for file in files if file.exists())
        return tuple((stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size) for stat in stats)

    @contextmanager
    def read_at_once(self) -> Iterator[None]:
        """Refuse weights that are replaced inside the block, which reads them.

        Raises:
            LensError: they are other files at its end.
        """
        before = self.state
        yield
        if self.state != before:
            raise LensError(f"expected the weights of {self.path} to stay while they are read, got others; run again")

    def require_unchanged(self, sha256: str) -> None:
        """Read the weights again at the end of a long job, and refuse them if they were replaced meanwhile.

        Args:
            sha256: their hash when the job began.
        """
        now = sha256_files(Checkpoint(self.path).weight_files)
        if now != sha256:
            raise LensError(
                f"expected the weights of {self.path} as they were at the start ({sha256[:12]}…), got {now[:12]}…; "
                "they were replaced meanwhile, so run again"
            )

    @property
    def n_bytes(self) -> int:
        """The size of the weight files on disk."""
        return sum(file.stat().st_size for file in self.weight_files)

    def require_whole(self) -> None:
        """Refuse a directory whose files are not one plain model: from names and headers alone.

        Raises:
            RequestError: says what is missing, ambiguous or of another kind.
        """
        self.refuse_adapter()
        self._refuse_quantised()
        named = self.config.get("transformers_weights")
        if named not in (None, WEIGHTS, WEIGHTS_INDEX):
            raise RequestError(
                f"expected weights in {WEIGHTS} or its shards, got transformers_weights {named!r} in "
                f"{self.path / 'config.json'}; rename the file and remove the entry"
            )
        _ = self.tensors
        settings_files(self.path)

    def refuse_adapter(self) -> None:
        """Refuse an adapter, alone or beside weights: transformers would load the model that it names as its base."""
        if (self.path / "adapter_config.json").exists():
            raise RequestError(
                f"expected a whole model in {self.path}, got a PEFT adapter; merge it into its base "
                "(merge_and_unload), save that, and remove adapter_config.json"
            )

    def _refuse_quantised(self) -> None:
        parts = [self.config, *(part for part in self.config.values() if isinstance(part, dict))]
        entries = [part[name] for part in parts for name in _QUANTISED_ENTRIES if part.get(name)]
        kinds = [str(entry.get("quant_method", "unnamed")) for entry in entries if isinstance(entry, dict)]
        kinds += ["unnamed"] * (len(entries) - len(kinds))
        kinds += [name for name in _QUANTISED if (self.path / name).exists()]
        if kinds:
            raise RequestError(
                f"expected weights in float32, bfloat16 or float16, got {kinds[0]} quantisation in {self.path}; name "
                "the original, or save a dequantised copy (model.dequantize(), save_pretrained)"
            )

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


def sha256_files(files: Sequence[Path]) -> str:
    """The hash of a single file, or the hash of several files' hashes in their order."""
    digests = [sha256_file(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


@functools.cache
def _sha256_of_state(files: tuple[Path, ...], state: tuple[tuple[int, ...], ...]) -> str:
    """The hash of weight files, computed once per state of theirs."""
    return sha256_files(files)
