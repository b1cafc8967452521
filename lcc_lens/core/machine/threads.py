"""How many threads torch computes with, where other processes use the same cores."""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
#: Fewer threads are taken where they are so many times as fast as all.
_WORTH = 1.3
_ROUNDS = 5
_WIDTH = 512

_is_open: ContextVar[bool] = ContextVar("threads are to be chosen", default=False)


@contextmanager
def threads_chosen() -> Iterator[None]:
    """Within the block, the first model that is loaded chooses how many threads torch uses; see
    :func:`settle_threads`."""
    token = _is_open.set(True)
    try:
        yield
    finally:
        _is_open.reset(token)


def settle_threads(device: torch.device) -> None:
    """Choose torch's threads once, inside :func:`threads_chosen`, unless ``OMP_NUM_THREADS`` says how many or a GPU
    computes.

    Threads that wait for a core which another process uses hold all others up, so two can be slower than one. A fifth
    of a second of matrix products tells; fewer threads are taken where they are clearly faster, with a line in the log.
    """
    if not _is_open.get() or device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return
    import torch

    _is_open.set(False)
    n = torch.get_num_threads()
    chosen = fastest(candidates(n), _product_seconds)
    torch.set_num_threads(chosen)
    if chosen < n:
        logger.warning(
            "other processes use the cores: computing with %d of %d threads, which is faster now; OMP_NUM_THREADS=%d "
            "takes all", chosen, n, n,
        )  # fmt: skip


def candidates(n: int) -> list[int]:
    """All threads, a half of them, a quarter, and so on.

    Example:
        >>> candidates(6)
        [6, 3, 1]
    """
    return [n, *candidates(n // 2)] if n > 1 else [n]


def fastest(counts: Sequence[int], seconds: Callable[[int], float]) -> int:
    """The count with the smallest median of times, in turns; the first one unless another is clearly faster.

    Example:
        >>> fastest([2, 1], lambda n: 1.0 if n == 2 else 0.9)
        2
        >>> fastest([2, 1], lambda n: 1.0 if n == 2 else 0.3)
        1
    """
    rounds = [[seconds(count) for count in counts] for _ in range(_ROUNDS if len(counts) > 1 else 0)]
    times = [statistics.median(column) for column in zip(*rounds, strict=True)]
    best = min(range(len(times)), key=times.__getitem__, default=0)
    return counts[best] if times and times[0] > _WORTH * times[best] else counts[0]


def _product_seconds(threads: int) -> float:
    """Seconds of a few matrix products with so many threads."""
    import torch

    torch.set_num_threads(threads)
    matrix = torch.ones(_WIDTH, _WIDTH)
    start = time.perf_counter()
    for _ in range(3):
        matrix @ matrix
    return time.perf_counter() - start
