"""Folders that appear whole: they replace only what this program wrote, and a kill loses no copy."""

from __future__ import annotations

import logging
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lcc_lens.core.config import package_version
from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import disk_errors, hidden_sibling, remove_leftovers, temporary, write_json
from lcc_lens.core.outputs.locks import LOCK, locked_alone, try_writing
from lcc_lens.core.reading import read_json

logger = logging.getLogger(__name__)

#: The file that names, in a folder that this program wrote, every file that it wrote there.
MARK = ".lcc_lens"
#: Records of versions that left no mark, and what else such folders hold.
_RECORDS, _SUFFIXES = ("pruning.json", "refit.json", "converted.json"), (".safetensors", ".json", ".jinja", ".txt")
_CARD = "tags: [pruned, restorelcc, lcc-lens]"


@contextmanager
def reserved(out: Path, *, overwrite: bool, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Hold a folder that will be written: no other command writes it, and it can be written.

    What a killed command left of the folder is brought in order first: the copy that it was replacing is restored.

    Args:
        out: the folder; a link is followed.
        overwrite: whether an existing folder may be replaced.
        inputs: what the job reads.

    Yields:
        The folder behind the link.

    Raises:
        RequestError: see :func:`require_free`; or another command is writing the folder.
    """
    target = folder_to_write(out)
    _require_apart(target, inputs)
    with locked_alone(hidden_sibling(target, LOCK), target):
        remove_leftovers(target.parent)
        _tidy(target)
        require_free(target, overwrite=overwrite, inputs=inputs)
        try:
            yield target
        finally:
            _restore_copy(target)


@contextmanager
def atomic_directory(path: Path, *, overwrite: bool = False, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes ``path`` if the block succeeds, and is deleted otherwise.

    The folder gets a mark that names its files. A killed process leaves ``path`` as it was, new, or for a moment
    missing; the next command that writes or reads it brings the old copy back.

    Raises:
        RequestError: see :func:`reserved`.
    """
    with disk_errors(path), reserved(path, overwrite=overwrite, inputs=inputs) as target:
        part = temporary(target)
        part.mkdir()
        try:
            yield part
            _finish(part, target)
            if target.exists():
                old = _old_copy(target)
                os.replace(target, old)
                os.replace(part, target)
                shutil.rmtree(old)
            else:
                os.replace(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def require_free(out: Path, *, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse a folder that may not be written, or that is in use and may not be replaced.

    Raises:
        RequestError: ``out`` is an input of the job, or holds one, the home folder or the current one; it is a file, or
            a link to nothing; it is not empty, and ``overwrite`` is false or it holds what this program did not write.
    """
    target = folder_to_write(out)
    _require_apart(target, inputs)
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise RequestError(f"{out} exists already; name another folder or pass --overwrite")
    foreign = _foreign_files(target)
    if foreign is None:
        raise RequestError(
            f"expected a folder that lcc-lens wrote, got {out} without its mark; name another folder, or delete it "
            "yourself"
        )
    if foreign:
        raise RequestError(
            f"expected only what lcc-lens wrote in {out}, got {foreign[0]}; move it, or name another folder"
        )


def recover(folder: Path) -> None:
    """Bring a folder in order that a killed command was writing, unless another command is at it now."""
    target = Path(os.path.realpath(folder))
    if not target.name or target.is_symlink():  # the root, or a link to itself
        return
    if _old_copy(target).exists() or _is_done(target):
        with suppress(RequestError), locked_alone(hidden_sibling(target, LOCK), target):
            _tidy(target)


def unfinished_work(out: Path) -> Path:
    """The hidden folder beside an output where unfinished work on it is kept."""
    return hidden_sibling(out.resolve(), "unfinished")


def note_written(file: Path) -> None:
    """Add a file that was just written into a folder of this program to the folder's mark."""
    written = _marked_files(file.parent)
    if written is not None:
        _write_mark(file.parent, [*written, file.name])


def require_claimable(folder: Path, names: Sequence[str]) -> None:
    """Refuse, before the work, files that a folder holds already and that this program did not write.

    Raises:
        RequestError: names the first of them; or files cannot be written there.
    """
    with disk_errors(folder):
        folder_to_write(folder)
        written = _marked_files(folder) or []
        if taken := [name for name in names if (folder / name).exists() and name not in written]:
            raise RequestError(
                f"expected to replace only what lcc-lens wrote, got another {taken[0]} in {folder}; name another folder"
            )
        try_writing(folder)


def claim_files(folder: Path, names: Sequence[str]) -> None:
    """Note in a folder's mark the files that will be written there.

    Raises:
        RequestError: see :func:`require_claimable`.
    """
    require_claimable(folder, names)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_mark(folder, [*(_marked_files(folder) or []), *names])


def folder_to_write(path: Path) -> Path:
    """The folder that writing to ``path`` writes: the end of a link."""
    with disk_errors(path):
        try:
            mode = path.stat().st_mode
        except FileNotFoundError as error:
            if path.is_symlink():
                raise RequestError(f"expected a folder to write, got the link {path} to nothing; remove it") from error
            return path.resolve()
        if not stat.S_ISDIR(mode):
            raise RequestError(f"expected a folder to write, got the file {path}, which exists already; name a folder")
        return path.resolve()


def _require_apart(target: Path, inputs: Iterable[Path]) -> None:
    """Refuse a folder that is or holds an input, the home folder or the current one."""
    kept = [("the input", path) for path in inputs]
    with suppress(OSError, RuntimeError):
        kept.append(("the current folder", Path.cwd()))
    with suppress(OSError, RuntimeError):
        kept.append(("the home folder", Path.home()))
    for what, path in kept:
        if path.resolve().is_relative_to(target):
            raise RequestError(
                f"expected an output folder that does not hold {what} {path}, got {target}; name another folder"
            )


def _foreign_files(folder: Path) -> list[str] | None:
    """Files in a folder that this program did not write; None where it did not write the folder."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not _is_plain_folder(path))
    if (folder / MARK).is_file():
        written = _marked_files(folder)
        return None if written is None else [name for name in files if name != MARK and name not in written]
    if not (any((folder / name).is_file() for name in _RECORDS) or _has_card(folder)):
        return None
    return [name for name in files if "/" in name or not name.endswith((*_SUFFIXES, ".model", ".md"))]


def _marked_files(folder: Path) -> list[str] | None:
    """The files that a folder's mark names; None without a mark, or with one of another layout."""
    record = read_json(folder / MARK) if (folder / MARK).is_file() else None
    files = record.get("files") if isinstance(record, dict) else None
    return files if isinstance(files, list) else None


def _write_mark(folder: Path, files: Iterable[str]) -> None:
    write_json(folder / MARK, {"written_by": f"lcc-lens {package_version()}", "files": sorted(set(files))})


def _is_plain_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _has_card(folder: Path) -> bool:
    card = folder / "README.md"
    return card.is_file() and _CARD in card.read_text(encoding="utf-8", errors="replace")[:500]


def _finish(part: Path, target: Path) -> None:
    """Mark a finished folder, with the modes that ``cp`` would give."""
    mode = stat.S_IMODE(part.stat().st_mode)
    entries = [path for path in sorted(part.rglob("*")) if not path.is_symlink()]
    files = [path.relative_to(part).as_posix() for path in entries if path.is_file()]
    _write_mark(part, files)
    for path in entries:
        path.chmod(mode if path.is_dir() else mode & 0o666)
    if target.exists():
        part.chmod(stat.S_IMODE(target.stat().st_mode))


def _old_copy(target: Path) -> Path:
    return hidden_sibling(target, "lcc-lens-old")


def _tidy(target: Path) -> None:
    """Remove work that was finished before its process was killed, and end a replacement that was cut off."""
    if _is_done(target):
        shutil.rmtree(unfinished_work(target), ignore_errors=True)
    _restore_copy(target)


def _restore_copy(target: Path) -> None:
    """Keep the new copy of a folder that was being replaced if it is in its place, else the old one."""
    old = _old_copy(target)
    if not old.exists():
        return
    if (target / MARK).exists():
        shutil.rmtree(old, ignore_errors=True)
    elif not target.exists() or not any(target.iterdir()):
        os.replace(old, target)
        logger.info("restored %s, which a command that was cut off was replacing", target)
    else:
        raise RequestError(f"expected {target} or its older copy {old}, got both; delete the one that you do not need")


def _is_done(target: Path) -> bool:
    """Whether an output is newer than the work on it, which a killed process could not delete any more."""
    mark, work = target / MARK, unfinished_work(target)
    if not (mark.exists() and work.exists()):
        return False
    times = [file.stat().st_mtime_ns for file in work.glob("*.safetensors")]  # none: the deletion had begun
    return mark.stat().st_mtime_ns >= max(times, default=0)
