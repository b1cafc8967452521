"""Reading and writing files: atomic writes, JSON, safetensors, hashes and locks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcc_lens.core.errors import DiskFullError, RequestError

if TYPE_CHECKING:
    from torch import Tensor

#: Bytes read at once where a file is hashed or compressed.
CHUNK = 1 << 22


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Report a failed write below ``path`` in one line."""
    try:
        yield
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        # safetensors reports a full disk through an error type of its own
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise DiskFullError(
                f"no space left on the disk of {path}; free some and run again (nothing was kept)"
            ) from error
        if code in (errno.EACCES, errno.EROFS, errno.ENOTDIR):
            raise RequestError(
                f"cannot write to {path}: {os.strerror(code)}; name a folder you may write to"
            ) from error
        raise


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling file that replaces ``path`` if the block succeeds, and is deleted otherwise."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        part = Path(name)
        try:
            yield part
            part.chmod(0o644)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes ``path`` if the block succeeds, and is deleted otherwise.

    Raises:
        RequestError: ``path`` exists and ``overwrite`` is false.
    """
    require_free(path, overwrite=overwrite)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        part.chmod(0o755)
        try:
            yield part
            if path.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
                os.replace(path, old / path.name)
                os.replace(part, path)
                shutil.rmtree(old)
            else:
                os.replace(part, path)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def give_mode(path: Path) -> None:
    """Give a new file or folder the permissions that the user's umask leaves, whatever wrote it."""
    umask = os.umask(0o077)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def require_free(path: Path, *, overwrite: bool) -> None:
    """Refuse an existing folder that is not empty, unless it may be replaced."""
    if path.exists() and not overwrite and (not path.is_dir() or any(path.iterdir())):
        raise RequestError(f"{path} exists already; name another folder or pass --overwrite")


def require_space(path: Path, n_bytes: int) -> None:
    """Refuse, before any work, a disk with fewer than ``n_bytes`` free."""
    folder = path
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise RequestError(
            f"expected {n_bytes / 1e6:.0f} MB of disk for {path}, got {free / 1e6:.0f} MB free; "
            "free some space or name a folder on another disk"
        )


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, refusing NaN and infinity."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    from safetensors.torch import save_file

    with atomic_path(path) as part:
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, part, metadata=dict(metadata or {})
        )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and its metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except FileNotFoundError as error:
        raise RequestError(f"expected the file {path}, got nothing there; check the path") from error
    except SafetensorError as error:
        raise RequestError(f"expected a safetensors file in {path}, got a damaged one ({error}); rebuild it") from error


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def locked(folder: Path, work: str) -> Iterator[None]:
    """Let one process at a time into the block; a process that ends in any way releases the lock.

    Args:
        folder: the folder of the lock, a hidden file; it is created if missing.
        work: what the lock is for; locks of different names do not wait for each other.
    """
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{work}.lock"):
        yield
