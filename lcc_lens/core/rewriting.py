"""Writing checkpoints: copies with edited tensors, and weights in another format, split or in other shards."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcc_lens.core.checkpoint import WEIGHTS, WEIGHTS_INDEX, Checkpoint
from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import give_mode, write_json
from lcc_lens.core.side_files import copy_side_files, with_older_entries, without_untrusted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Rows of a stored tensor under new names, by the stored name: the new name and how many rows, in order.
Splits = Mapping[str, Sequence[tuple[str, int]]]
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(size: int | str) -> int:
    """Bytes from a number or a text such as ``5GB``."""
    match = re.fullmatch(r"(\d{1,18})\s*(|KB|MB|GB)", str(size).strip(), flags=re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise RequestError(f"expected a size such as 5GB or a number of bytes, got {size!r}")
    return int(match[1]) * _UNITS[match[2].upper()]


def tensor_bytes(file: Path) -> int:
    """The bytes of a file's tensors: its size without the header, whose length the first eight bytes give."""
    with file.open("rb") as handle:
        return file.stat().st_size - 8 - int.from_bytes(handle.read(8), "little")


def copy_checkpoint(
    source: Checkpoint,
    target: Path,
    *,
    replaced: Mapping[str, Tensor],
    added: Mapping[str, Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    resize: bool = False,
) -> None:
    """Copy a checkpoint, replacing and adding tensors; every other tensor stays bit-identical.

    Args:
        replaced: new values by tensor name, of the stored shape; cast to the stored dtype. They are looked up one at a
            time, so a mapping that reads from disk keeps little in memory.
        added: tensors that the source does not have; they go into the first shard.
        config: entries of ``config.json`` to set.
        resize: whether replaced tensors may have other shapes.
    """
    if unknown := set(replaced) - source.tensors.keys():
        raise RequestError(
            f"expected the tensor {min(unknown)} in {source.path}, got none of that name; the layout is not supported"
        )
    for number, file in enumerate(source.weight_files):
        _copy_weights(file, target / file.name, replaced, (added or {}) if number == 0 else {}, resize=resize)
    copy_side_files(source.path, target)
    write_json(target / "config.json", with_older_entries(without_untrusted({**source.config, **(config or {})})))
    _write_index(target, [file.name for file in source.weight_files])


def _copy_weights(
    source: Path, target: Path, replaced: Mapping[str, Tensor], added: Mapping[str, Tensor], *, resize: bool
) -> None:
    """Copy one weight file with edits."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(source, framework="pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}
        metadata = dict(handle.metadata() or {"format": "pt"})
    for name in tensors.keys() & replaced.keys():
        old, new = tensors[name], replaced[name]
        if old.shape != new.shape and not resize:
            raise RequestError(f"expected {name} of shape {tuple(old.shape)}, got {tuple(new.shape)}")
        tensors[name] = new.to(device="cpu", dtype=old.dtype).contiguous()
    tensors.update({name: tensor.detach().cpu().contiguous() for name, tensor in added.items()})
    save_file(tensors, target, metadata=metadata)
    give_mode(target)


@dataclass(frozen=True)
class _Piece:
    """A tensor to write: a stored one, or some of its rows."""

    name: str
    source: str
    file: Path
    rows: slice | None

    def read(self, checkpoint: Checkpoint, dtype: torch.dtype | None) -> Tensor:
        """The tensor in the new format."""
        tensor = checkpoint.read(self.source)
        tensor = tensor if self.rows is None else tensor[self.rows].clone()
        if dtype is None or not tensor.is_floating_point():
            return tensor
        cast = tensor.to(dtype)
        if not bool(cast.isfinite().all()):
            raise LensError(
                f"expected numbers that {dtype} holds, got larger ones in {self.name}; choose bfloat16 or float32"
            )
        return cast


def rewrite_weights(
    directory: Path,
    *,
    splits: Splits | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Replace the weight files of a folder that nobody reads yet, with one file in memory at a time.

    Args:
        splits: tensors to split into rows under other names; every bit of them stays.
        dtype: the format of floating-point tensors; as they are if not given.
        max_shard_size: bytes per file at most (one tensor may be larger); the same files as before if not given.

    Raises:
        LensError: a number is too large for the format.
    """
    from safetensors.torch import save_file

    checkpoint = Checkpoint(directory)
    pieces = list(_pieces(checkpoint, splits or {}))
    if max_shard_size is None:
        shards = {file.name: [piece for piece in pieces if piece.file == file] for file in checkpoint.weight_files}
    else:
        shards = _packed(checkpoint, pieces, parse_size(max_shard_size), dtype)
    for name, shard in shards.items():
        tensors = {piece.name: piece.read(checkpoint, dtype) for piece in shard}
        save_file(tensors, directory / f"{name}.new", metadata={"format": "pt"})
    for file in checkpoint.weight_files:
        file.unlink()
    for name in shards:
        (directory / f"{name}.new").rename(directory / name)
        give_mode(directory / name)
    _write_index(directory, list(shards))


def _pieces(checkpoint: Checkpoint, splits: Splits) -> Iterator[_Piece]:
    for source, stored in checkpoint.tensors.items():
        start = 0
        for name, n_rows in splits.get(source, ()):
            yield _Piece(name, source, stored.file, slice(start, start + n_rows))
            start += n_rows
        if source not in splits:
            yield _Piece(source, source, stored.file, None)


def _packed(
    checkpoint: Checkpoint, pieces: Sequence[_Piece], limit: int, dtype: torch.dtype | None
) -> dict[str, list[_Piece]]:
    """Pieces in order by file name, as many to a file as fit."""
    shards: list[list[_Piece]] = [[]]
    size = 0
    for piece in pieces:
        n_bytes = piece.read(checkpoint, dtype).nbytes
        if shards[-1] and size + n_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += n_bytes
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _write_index(directory: Path, files: Sequence[str]) -> None:
    """Write the index of shards, from their headers; ``model.safetensors`` needs none."""
    from safetensors import safe_open

    (directory / WEIGHTS_INDEX).unlink(missing_ok=True)
    if list(files) == [WEIGHTS]:
        return
    weight_map: dict[str, str] = {}
    n_parameters = 0
    for file in files:
        with safe_open(directory / file, framework="pt") as handle:
            weight_map.update(dict.fromkeys(handle.keys(), file))
            n_parameters += sum(math.prod(handle.get_slice(name).get_shape()) for name in handle.keys())
    sizes = {"total_size": sum(tensor_bytes(directory / file) for file in files), "total_parameters": n_parameters}
    write_json(directory / WEIGHTS_INDEX, {"metadata": sizes, "weight_map": weight_map})
