"""A checkpoint's weight files written anew: fused maps split, another format, other shards."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.core.files import WEIGHTS_INDEX, tensor_bytes, tensor_names, weight_files, write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Rows of a stored tensor under new names, by the stored name: the new name and how many rows, in order.
Splits = Mapping[str, Sequence[tuple[str, int]]]
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class _Piece:
    """A tensor to write: a stored one, or some of its rows."""

    name: str
    source: str
    file: Path
    rows: tuple[int, int] | None


def parse_size(size: int | str) -> int:
    """Bytes from a number or a text such as ``5GB``.

    Raises:
        RequestError: it is neither, or nothing fits into it.
    """
    match = re.fullmatch(r"(\d+)\s*(|KB|MB|GB)", str(size).strip(), flags=re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise RequestError(f"expected a size such as 5GB or a number of bytes, got {size!r}")
    return int(match[1]) * _UNITS[match[2].upper()]


def rewrite_weights(
    directory: Path,
    *,
    splits: Splits | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Write the weights of a folder that nobody reads yet anew, one file in memory at a time.

    Args:
        directory: a Hugging Face directory.
        splits: tensors to split into rows under other names; every bit of them stays.
        dtype: the format of floating-point tensors; as they are if not given.
        max_shard_size: bytes per file at most (one tensor may be larger); the files that there are if not given.

    Raises:
        LensError: a number does not fit the format.
    """
    from safetensors.torch import save_file

    files = weight_files(directory)
    pieces = list(_pieces(directory, splits or {}))
    if max_shard_size is None:
        groups = {file.name: [piece for piece in pieces if piece.file == file] for file in files}
    else:
        groups = _packed(pieces, parse_size(max_shard_size), dtype)
    for name, group in groups.items():
        tensors = {piece.name: _cast(piece.name, _read(piece), dtype) for piece in group}
        save_file(tensors, directory / f"{name}.new", metadata={"format": "pt"})
    for file in files:
        file.unlink()
    for name in groups:
        (directory / f"{name}.new").rename(directory / name)
        (directory / name).chmod(0o644)
    _write_index(directory, groups)


def _pieces(directory: Path, splits: Splits) -> Iterator[_Piece]:
    for source, file in tensor_names(directory).items():
        start = 0
        for name, n_rows in splits.get(source, ()):
            yield _Piece(name, source, file, (start, start + n_rows))
            start += n_rows
        if source not in splits:
            yield _Piece(source, source, file, None)


def _packed(pieces: Sequence[_Piece], limit: int, dtype: torch.dtype | None) -> dict[str, list[_Piece]]:
    """Pieces by file name, in order, so many to a file as fit."""
    shards: list[list[_Piece]] = [[]]
    size = 0
    for piece in pieces:
        tensor = _cast(piece.name, _read(piece), dtype)
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _read(piece: _Piece) -> Tensor:
    from safetensors import safe_open

    with safe_open(piece.file, framework="pt") as handle:
        tensor: Tensor = handle.get_tensor(piece.source)
    return tensor if piece.rows is None else tensor[piece.rows[0] : piece.rows[1]].clone()


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    new = tensor.to(dtype)
    if not bool(new.isfinite().all()):
        raise LensError(f"expected numbers that {dtype} holds, got larger ones in {name}; choose bfloat16 or float32")
    return new


def _write_index(directory: Path, groups: Mapping[str, Sequence[_Piece]]) -> None:
    (directory / WEIGHTS_INDEX).unlink(missing_ok=True)
    if len(groups) == 1:
        return
    where = {piece.name: name for name, group in groups.items() for piece in group}
    total = sum(tensor_bytes(directory / name) for name in groups)
    write_json(directory / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": where})
