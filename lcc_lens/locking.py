"""Work in a folder that one process at a time may do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
