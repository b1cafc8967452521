"""Locks: one command at a time writes a folder, and where it cannot write it says so before the work."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lcc_lens.core.errors import RequestError
from lcc_lens.core.files import disk_errors, temporary

LOCK = "lcc-lens-lock"
#: Seconds to wait for another command that writes the same.
_PATIENCE = 2.0


@contextmanager
def locked_alone(lock: Path, target: Path) -> Iterator[None]:
    """Let one process at a time, and one thread of it, into the block; nothing stays where nothing was written."""
    from filelock import FileLock, Timeout

    made = [folder for folder in (lock.parent, *lock.parent.parents) if not folder.exists()]
    held = FileLock(lock, timeout=_PATIENCE, is_singleton=True)
    try:
        with disk_errors(target):
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.acquire()
            if held.lock_counter == 1:
                lock.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
                try_writing(lock.parent)
        yield
    except Timeout as error:
        raise RequestError(
            f"expected {target} for this command alone, got {_holder(lock)} writing it; wait for that one, or name "
            "another folder"
        ) from error
    finally:
        if held.lock_counter == 1:
            lock.unlink(missing_ok=True)  # before it is free: whoever waits for it sees that it is gone
        if held.is_locked:
            held.release()
        if not held.is_locked:
            for folder in made:
                with suppress(OSError):  # holds something by now
                    folder.rmdir()


def _holder(lock: Path) -> str:
    with suppress(OSError):
        return lock.read_text(encoding="utf-8", errors="replace")[:100] or "another one"
    return "another one"


def try_writing(folder: Path) -> None:
    """Write a few bytes where a file or folder will be made."""
    while not folder.exists():
        folder = folder.parent
    probe = temporary(folder / "probe")
    try:
        probe.write_bytes(bytes(1 << 16))
    finally:
        probe.unlink(missing_ok=True)
