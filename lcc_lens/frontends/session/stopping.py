"""Stop a computation of models in the middle."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lcc_lens.core.errors import LensError


class Stopped(LensError):
    """The reader stopped a job in the middle."""


@contextmanager
def stoppable(stop: threading.Event) -> Iterator[None]:
    """End this thread's forward passes inside the block at their next module once the event is set.

    Raises:
        Stopped: the event was set.
    """
    thread = threading.get_ident()

    def check(module: nn.Module, inputs: Any) -> None:
        if stop.is_set() and threading.get_ident() == thread:
            raise Stopped("stopped; nothing was changed")

    hook = register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()
