"""Giving memory back: what Python no longer refers to, and what the C library keeps for later."""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable

import torch


def release_memory() -> None:
    """Give back what nothing refers to; hooked models refer to themselves, so counting references is not enough."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Return freed memory to the system where the C library can: batches of many shapes leave holes that add up."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``; None with another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
