"""Reading and writing files: atomic writes, leftovers of killed processes, JSON, safetensors, hashes and locks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcc_lens.core.errors import DiskFullError, RequestError
from lcc_lens.core.fingerprint import fingerprint

if TYPE_CHECKING:
    from torch import Tensor

#: Bytes read at once where a file is hashed or compressed.
CHUNK = 1 << 22
#: Failures of a write that another path avoids.
_WRONG_PLACE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
    errno.ENOENT,  # of folders that take no files, such as /proc
}  # fmt: skip
#: Bytes of a file's name on most disks.
_LONGEST_NAME = 255
#: What is being written, beside its place: the name, then host and process that write.
_TEMPORARY = re.compile(r"\..*\.lcc-lens-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}")
#: In a sealed file: the hash of everything else in it.
_SEAL = "sealed_sha256"
#: Seconds after which a temporary file of another host counts as left over.
_DAY = 86400


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Report a failed write below ``path`` in one line."""
    try:
        yield
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        # safetensors reports a full disk through an error type of its own
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise DiskFullError(path) from error
        if code in _WRONG_PLACE:
            raise RequestError(
                f"cannot write to {path}: {os.strerror(code or 0)}; name a place where you may write"
            ) from error
        raise


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling file that replaces ``path`` if the block succeeds, and is deleted otherwise.

    Links and permissions are treated as ``cp`` does: a link is followed, a new file's mode follows the umask, and a
    file that is replaced keeps its mode.

    Raises:
        RequestError: see :func:`file_to_write`.
    """
    with disk_errors(path):
        target = file_to_write(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent)
        part = temporary(target)
        try:
            part.touch(mode=0o666, exist_ok=False)
            mode = stat.S_IMODE((target if target.exists() else part).stat().st_mode)
            yield part
            part.chmod(mode)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


def file_to_write(path: Path) -> Path:
    """The file that writing to ``path`` writes: the end of a link.

    Raises:
        RequestError: a folder, a device or a pipe, a link to nothing, or a file that may not be written.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        if path.is_symlink():
            raise RequestError(f"expected a file to write, got the link {path} to nothing; remove it") from error
        return path
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode) else "device"
        raise RequestError(f"expected a file to write, got the {kind} {path}; name a file")
    if not os.access(path, os.W_OK):
        raise RequestError(f"expected a file that may be written, got the read-only {path}; name another file")
    return path.resolve()


def hidden_sibling(path: Path, kind: str) -> Path:
    """The hidden file or folder of a kind beside ``path``, whose name is shortened where a disk needs that."""
    name = path.name
    if len(os.fsencode(f".{name}.{kind}")) > _LONGEST_NAME:
        start = os.fsencode(name)[:100].decode("utf-8", "ignore")
        name = f"{start}~{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}"
    return path.with_name(f".{name}.{kind}")


def temporary(path: Path) -> Path:
    """A free name beside ``path`` for what will replace it, which says who writes."""
    return hidden_sibling(path, f"lcc-lens-{_host()}-{os.getpid()}-{secrets.token_hex(4)}")


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that have ended left half written in a folder."""
    for entry in folder.iterdir():
        found = _TEMPORARY.fullmatch(entry.name)
        if found is None or not _is_left_over(entry, found["host"], int(found["pid"])):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _host() -> str:
    return socket.gethostname()[:64].replace("/", "_")


def _is_left_over(entry: Path, host: str, pid: int) -> bool:
    if host == _host() and os.name == "posix":
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):  # of another user, so alive
            return False
        return False
    try:
        return time.time() - entry.lstat().st_mtime > _DAY
    except FileNotFoundError:
        return False


def give_mode(path: Path) -> None:
    """Give a new file or folder the permissions that the user's umask leaves, whatever wrote it."""
    umask = os.umask(0o077)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


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


def require_made(file: Path, command: str) -> Path:
    """A file that a command makes.

    Raises:
        RequestError: it is not there; the command is named.
    """
    if not file.exists():
        raise RequestError(f"expected {file}, got none; make it with {command}")
    return file


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


def write_sealed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose metadata hold a hash of all tensors and of the metadata."""
    write_tensors(path, tensors, {**metadata, _SEAL: fingerprint(dict(tensors), dict(metadata))})


def read_sealed(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what :func:`write_sealed` wrote.

    Raises:
        RequestError: the file is missing, or a byte of it has changed.
    """
    tensors, metadata = read_tensors(path)
    if metadata.pop(_SEAL, None) != fingerprint(tensors, metadata):
        raise RequestError(f"expected {path} as it was written, got a changed file; delete it")
    return tensors, metadata


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
