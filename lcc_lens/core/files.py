"""Files that are either whole or absent: atomic writes, hashes, and copies of checkpoints with edited tensors."""

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

CHUNK = 1 << 22
WEIGHTS_INDEX = "model.safetensors.index.json"
#: Notes about the source that would be untrue of a copy with other weights.
OWN_FILES = ("README.md", "pruning.json", "converted.json")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failed write below ``path`` into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"no space left on the disk of {path}; free some and run again (nothing was kept)"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR):
            raise RequestError(f"cannot write to {path}: {error.strerror}; name a folder you may write to") from error
        raise
    except Exception as error:  # safetensors reports a full disk through its own error type
        if "No space left" in str(error):
            raise DiskFullError(
                f"no space left on the disk of {path}; free some and run again (nothing was kept)"
            ) from error
        raise


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary sibling file that replaces ``path`` when the block ends well, and vanishes otherwise."""
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
    """Give a temporary sibling folder that becomes ``path`` when the block ends well, and vanishes otherwise.

    Raises:
        RequestError: ``path`` is there already and ``overwrite`` is false.
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


def require_free(path: Path, *, overwrite: bool) -> None:
    """Refuse a folder that is there already with something in it, unless it may be replaced.

    Raises:
        RequestError: ``path`` is a file or a folder that is not empty, and ``overwrite`` is false.
    """
    if path.exists() and not overwrite and (not path.is_dir() or any(path.iterdir())):
        raise RequestError(f"{path} exists already; name another folder or pass --overwrite")


def require_space(path: Path, n_bytes: int) -> None:
    """Refuse before any work when the disk of ``path`` has not ``n_bytes`` free.

    Raises:
        RequestError: too little space.
    """
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


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        RequestError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RequestError(f"expected the file {path}, got nothing there; check the path") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RequestError(
            f"expected JSON in {path}, got something else ({error}); restore or rebuild the file"
        ) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    from safetensors.torch import save_file

    with atomic_path(path) as part:
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, part, metadata=dict(metadata or {})
        )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and its metadata.

    Raises:
        RequestError: the file is missing, truncated or no safetensors file.
    """
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


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that hold a checkpoint's weights, in name order.

    Raises:
        RequestError: there are none, or an index names a shard that is missing.
    """
    index = directory / WEIGHTS_INDEX
    if index.exists():
        files = [directory / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    else:
        files = sorted(directory.glob("model*.safetensors"))
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise RequestError(
            f"expected every shard of {directory}, got none named {missing[0]}; fetch the checkpoint again"
        )
    if not files:
        pickles = sorted(p.name for p in directory.glob("*.bin"))
        hint = f"got the pickle {pickles[0]}; convert it to safetensors first" if pickles else "got none"
        raise RequestError(f"expected model.safetensors in {directory}, {hint}")
    return files


def weights_sha256(directory: Path) -> str:
    """The SHA-256 that identifies a checkpoint's weights.

    For a single ``model.safetensors`` it is that file's own hash; for shards, the hash of their hashes in name order.
    """
    digests = [sha256_file(file) for file in weight_files(directory)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def tensor_names(directory: Path) -> dict[str, Path]:
    """Every tensor of a checkpoint and the file that holds it."""
    from safetensors import SafetensorError, safe_open

    where: dict[str, Path] = {}
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt") as handle:
                where.update(dict.fromkeys(handle.keys(), file))
        except SafetensorError as error:
            raise RequestError(
                f"expected a safetensors file in {file}, got a damaged one ({error}); fetch it again"
            ) from error
    return where


def stored_name(stored: Mapping[str, Path], name: str) -> str:
    """A tensor's name in a checkpoint: as the model names it, or without the base model's prefix (original GPT-2)."""
    short = name.partition(".")[2]
    return short if name not in stored and short in stored else name


def read_tensor(stored: Mapping[str, Path], name: str) -> Tensor:
    """One tensor of a checkpoint (see `tensor_names`).

    Raises:
        RequestError: the checkpoint has no such tensor.
    """
    from safetensors import safe_open

    if name not in stored:
        raise RequestError(
            f"expected the tensor {name} in the checkpoint, got none of that name; the layout is not supported"
        )
    with safe_open(stored[name], framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def copy_checkpoint(
    source: Path,
    target: Path,
    *,
    replaced: Mapping[str, Tensor],
    added: Mapping[str, Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    resize: bool = False,
) -> None:
    """Copy a Hugging Face checkpoint, replacing and adding tensors; every other tensor stays bit-identical.

    Args:
        source: the checkpoint to copy.
        target: an existing, empty folder.
        replaced: new values by tensor name, of the stored shape; cast to the stored dtype. Asked for one by one, so a
            mapping that reads from disk keeps little in memory.
        added: tensors that the source does not have; they go into the first shard.
        config: entries of ``config.json`` to set.
        resize: whether replaced tensors may have other shapes.

    Raises:
        RequestError: a replaced tensor is not in the checkpoint or has another shape.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    files = weight_files(source)
    unknown = set(replaced) - set(tensor_names(source))
    if unknown:
        raise RequestError(
            f"expected the tensor {min(unknown)} in {source}, got none of that name; the layout is not supported"
        )
    for number, file in enumerate(files):
        with safe_open(file, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}
            metadata = dict(handle.metadata() or {"format": "pt"})
        for name in tensors.keys() & replaced.keys():
            new = replaced[name]
            if tensors[name].shape != new.shape and not resize:
                raise RequestError(f"expected {name} of shape {tuple(tensors[name].shape)}, got {tuple(new.shape)}")
            tensors[name] = new.to(device="cpu", dtype=tensors[name].dtype).contiguous()
        if number == 0 and added:
            tensors.update({name: tensor.detach().cpu().contiguous() for name, tensor in added.items()})
        save_file(tensors, target / file.name, metadata=metadata)
        (target / file.name).chmod(0o644)
    _copy_side_files(source, target, config or {})
    if (target / WEIGHTS_INDEX).exists() and (added or resize):
        index = read_json(target / WEIGHTS_INDEX)
        index["weight_map"].update(dict.fromkeys(added or (), files[0].name))
        if "total_size" in index.get("metadata", {}):
            index["metadata"]["total_size"] = sum(tensor_bytes(target / file.name) for file in files)
        write_json(target / WEIGHTS_INDEX, index)


def tensor_bytes(file: Path) -> int:
    """The bytes of a file's tensors: its size without the header, whose length the first eight bytes give."""
    with file.open("rb") as handle:
        return file.stat().st_size - 8 - int.from_bytes(handle.read(8), "little")


def _copy_side_files(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Copy tokenizer, templates and configuration, without weights, code, or our own notes about the source."""
    for file in sorted(source.iterdir()):
        is_small = file.suffix in (".json", ".jinja", ".txt", ".model") and file.name not in OWN_FILES
        if file.is_file() and is_small:
            shutil.copyfile(file, target / file.name)
    write_json(target / "config.json", {**read_json(source / "config.json"), **config})


@contextmanager
def locked(folder: Path, work: str) -> Iterator[None]:
    """Wait until no other process is in such a block; a process that ends in any way leaves it.

    Args:
        folder: where the lock lies, a hidden file; the folder is made if it is not there.
        work: what the lock is for: different work does not wait.
    """
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{work}.lock"):
        yield
