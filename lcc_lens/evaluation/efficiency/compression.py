"""Compressed size of a checkpoint's weights: what zeros in dense files save on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from lcc_lens.core.checkpoint import Checkpoint
from lcc_lens.core.files import CHUNK
from lcc_lens.core.progress import track
from lcc_lens.models.architecture.linear_maps import find_matrices

#: Zstandard's default; higher levels take many times longer and save a few per cent more.
LEVEL = 3


def zstd_bytes(chunks: Iterable[bytes | memoryview]) -> int:
    """The size of a zstd stream (level 3) of the chunks, in bytes."""
    import zstandard

    stream = zstandard.ZstdCompressor(level=LEVEL).compressobj()
    return sum(len(stream.compress(chunk)) for chunk in chunks) + len(stream.flush())


def compressed_size(path: Path) -> int:
    """The size of a checkpoint's weight files, each compressed with zstd (level 3), in bytes.

    The files are read in chunks, so memory does not grow with their size.

    Raises:
        RequestError: there are no weight files.
    """
    files = Checkpoint(path).weight_files
    return sum(zstd_bytes(_file_chunks(file)) for file in track(files, len(files), "compression"))


def matrix_sizes(path: Path) -> dict[str, tuple[int, int]]:
    """Stored and compressed size in bytes of every matrix that pruning may touch, by name.

    Raises:
        RequestError: as :func:`lcc_lens.models.architecture.linear_maps.find_matrices`.
    """
    matrices = [matrix for layer in find_matrices(Checkpoint(path)) for matrix in layer]
    sizes: dict[str, tuple[int, int]] = {}
    for matrix in track(matrices, len(matrices), "compression of matrices"):
        stored = matrix.rows(matrix.read())  # transposed twice: the layout of the file
        sizes[matrix.name] = (stored.nbytes, zstd_bytes(tensor_chunks(stored)))
    return sizes


def tensor_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes in chunks of a few megabytes."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    for start in range(0, len(flat), CHUNK):
        yield flat[start : start + CHUNK].data


def _file_chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as handle:
        while chunk := handle.read(CHUNK):
            yield chunk
