"""Progress bars of long steps: off in the library, on where a front end asks for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from lcc_lens.core.machine.processes import is_first_process

T = TypeVar("T")
Tracker = Callable[[Iterable[Any], int, str], Iterator[Any]]
#: Held while transformers loads a model.
_LOADING = threading.RLock()


def _silent(items: Iterable[T], total: int, description: str) -> Iterator[T]:
    yield from items


_tracker: ContextVar[Tracker] = ContextVar("lcc_lens_tracker", default=_silent)


def track(items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """Yield the items while the current front end shows progress."""
    yield from _tracker.get()(items, total, description)


@contextmanager
def tracked_by(tracker: Tracker) -> Iterator[None]:
    """Show progress inside the block with another tracker."""
    token = _tracker.set(tracker)
    try:
        yield
    finally:
        _tracker.reset(token)


def rich_tracker(items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """A progress bar with the time left, on standard error."""
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description:<24}"), rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(), rich_progress.TimeElapsedColumn(), rich_progress.TextColumn("left"),
        rich_progress.TimeRemainingColumn(),
    )  # fmt: skip
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total)
        for item in items:
            yield item
            progress.advance(task)
        progress.update(task, completed=total)


@contextmanager
def shown() -> Iterator[None]:
    """Show progress bars inside the block; of several processes only the first shows them."""
    with tracked_by(rich_tracker if is_first_process() else _silent):
        yield


@contextmanager
def loading_models() -> Iterator[None]:
    """Load models of transformers inside the block without its progress bars, one thread at a time.

    While it loads, transformers replaces methods of its classes, such as ``tie_weights``, and restores them afterwards.
    Of two threads the later one would restore a replaced method, and embeddings would no longer be tied.
    """
    from transformers.utils import logging as transformers_logging

    with _LOADING:
        was_on = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            if was_on:
                transformers_logging.enable_progress_bar()
