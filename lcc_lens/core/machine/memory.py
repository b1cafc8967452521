"""Return freed memory to the system, and measure peak memory."""

from __future__ import annotations

import ctypes
import functools
import gc
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_PAGE = mmap.PAGESIZE
#: Where Linux tells how much memory a container may use, in both versions of its control groups.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def release_memory() -> None:
    """Free unreferenced objects; hooked models hold reference cycles, so only the garbage collector frees them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Return freed memory to the system if the C library can: batches of many shapes fragment the heap."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@dataclass
class PeakMemory:
    """The most memory used inside a block, minus what was used before, in MiB; None if it cannot be measured."""

    mib: float | None = None


@contextmanager
def peak_memory(device: torch.device, every: float = 0.02) -> Iterator[PeakMemory]:
    """Measure a block's peak memory: the allocator's on a GPU, else the process's resident pages, sampled.

    Args:
        every: seconds between two samples of the process.
    """
    peak = PeakMemory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.mib = (torch.cuda.max_memory_allocated(device) - before) / 2**20
        return
    start = _resident()
    if start is None:
        yield peak
        return
    highest, ended = [start], threading.Event()

    def watch() -> None:
        while not ended.wait(every):
            highest.append(max(highest.pop(), _resident() or 0))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()
        peak.mib = (max(highest[0], _resident() or 0) - start) / 2**20


def total_memory(device: torch.device) -> int | None:
    """Bytes of memory that a device has in all, free or not; the process's limit on a CPU; None if it is not told."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    limits = [int(text) for text in _texts(_LIMITS) if text.isdigit()]
    return min([physical, *limits])


def _texts(files: Sequence[Path]) -> list[str]:
    """The text of those files that can be read."""
    words = []
    for file in files:
        with suppress(OSError, ValueError):
            words.append(file.read_text(encoding="ascii").strip())
    return words


def _resident() -> int | None:
    """Resident bytes of this process; None if the system does not tell (it does on Linux)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):
        return None


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``; None with another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
