"""Run commands in forked processes that are killed, paused or watched at an exact file operation.

This process imports everything once and runs no model itself, so that a fork costs little and is safe.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lcc_lens.core.outputs.folders import MARK

#: Python's audit events of operations that change a disk; "open" counts where it writes.
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.copyfile", "shutil.rmtree"}
#: What differs between two runs of the same request.
_OF_THE_MOMENT = {
    "written",
    "seconds",
    "training_seconds",
    "refit_seconds",
    "memory_mib",
    "content_sha256",
    "sealed_sha256",
}


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (minus the signal that killed it), and what it printed as errors."""

    code: int
    errors: str
    changes: int
    """File operations below the watched folder."""


def run(
    arguments: Sequence[object], folder: Path, at: Callable[[int], None] = lambda number: None, *, limit: int = 0
) -> Ended:
    """Run a command in a forked process, with ``folder`` as the current one.

    Args:
        at: called in that process before every operation that changes a file in the folder, with its number.
        limit: kill the process where a file grows beyond so many bytes, in the middle of a write; never if 0.
    """
    pid = start(arguments, folder, at, limit=limit)
    return wait(pid, folder)


def start(
    arguments: Sequence[object], folder: Path, at: Callable[[int], None] = lambda number: None, *, limit: int = 0
) -> int:
    """Start a command as :func:`run` does; gives its process."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        code = _command([str(argument) for argument in arguments], folder, at, limit)
    finally:
        os._exit(code)


def wait(pid: int, folder: Path) -> Ended:
    """How a started command ended."""
    _, status = os.waitpid(pid, 0)
    notes, modules = beside(folder, "changes"), beside(folder, "modules")
    if modules.exists():  # the next processes find them imported
        for name in set(modules.read_text().split()) - sys.modules.keys():
            with suppress(Exception):
                importlib.import_module(name)
        modules.unlink()
        gc.collect()
        gc.freeze()
    changes = int(notes.read_text()) if notes.exists() else 0
    return Ended(os.waitstatus_to_exitcode(status), beside(folder, "errors").read_text().strip(), changes)


def beside(folder: Path, name: str) -> Path:
    """A file of the test itself, outside the folder that the command changes."""
    return folder.with_name(f"{folder.name}-{name}")


def _command(arguments: list[str], folder: Path, at: Callable[[int], None], limit: int) -> int:
    """The forked process: the command with its output in files and its changes of files counted."""
    import resource

    from lcc_lens.frontends.cli.main import run as run_command

    errors = os.open(beside(folder, "errors"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.chdir(folder)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    count, root = 0, str(folder.resolve())

    def watch(event: str, values: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event == "open" and isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in _CHANGES) and _is_below(values[0], root):
            count += 1
            at(count)

    sys.addaudithook(watch)
    code = run_command([*arguments, "--quiet"])
    sys.stderr.flush()
    beside(folder, "changes").write_text(str(count))
    beside(folder, "modules").write_text("\n".join(name for name in sys.modules if not name.startswith("_")))
    return code


def _is_below(path: Any, root: str) -> bool:
    return isinstance(path, str | os.PathLike) and os.path.abspath(os.fspath(path)).startswith(f"{root}/")


def killed_at(moment: int) -> Callable[[int], None]:
    """Kill the process before its n-th change of a file."""

    def at(number: int) -> None:
        if number == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    return at


def moments(n_changes: int, n: int, seed: int) -> list[int]:
    """Seeded numbers of changes, the first and the last among them."""
    inner = random.Random(seed).sample(range(2, n_changes), min(n, n_changes) - 2)
    return sorted([1, n_changes, *inner])


def flip_byte(file: Path, place: int = -1) -> None:
    """Change one byte of a file, by default its last one, which belongs to a tensor in a safetensors file."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(bytes(content))


def contents(folder: Path) -> dict[str, Any]:
    """What every file of a folder holds, without pictures, which are drawn from the others, and without times."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARK)
    files = [path for path in files if path.suffix != ".html"]
    return {path.relative_to(folder).as_posix(): _content(path) for path in files}


def hidden(folder: Path) -> list[str]:
    """Hidden files in a folder that a finished command should have removed; kept locks are empty files."""
    names = [path for path in folder.rglob(".*") if path.name != MARK]
    return sorted(path.relative_to(folder).as_posix() for path in names if path.is_dir() or path.stat().st_size)


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":  # the order of its header is not kept
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = _timeless({name: _plain(value) for name, value in (file.metadata() or {}).items()})
        return metadata, {
            name: (str(t.dtype), tuple(t.shape), hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest())
            for name, t in sorted(tensors.items())
        }
    if path.suffix in (".json", ".jsonl"):
        return [_timeless(json.loads(line)) for line in _texts(path)]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _texts(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def _plain(text: str) -> Any:
    try:
        return _timeless(json.loads(text))
    except ValueError:
        return text


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in _OF_THE_MOMENT}
    return [_timeless(item) for item in value] if isinstance(value, list) else value
