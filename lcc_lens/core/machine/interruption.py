"""Let Ctrl-C end a run after the current step, so that its state can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lcc_lens.core.machine.processes import n_processes, summed


class Interruption:
    """Whether the user pressed Ctrl-C; a second Ctrl-C stops at once.

    With several processes (see :mod:`lcc_lens.core.machine.processes`) each may get the signal more than once, from the
    terminal and from the launcher, and at different steps. There only the first signal counts, and the processes agree
    on the step after which they stop.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def watched(self) -> Iterator[Interruption]:
        """Catch Ctrl-C inside the block and set ``requested`` instead of raising."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return

        def request(number: int, frame: Any) -> None:
            if self.requested and n_processes() == 1:
                raise KeyboardInterrupt
            self.requested = True

        previous = signal.signal(signal.SIGINT, request)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, previous)

    def is_agreed(self) -> bool:
        """Whether any process was interrupted; all processes must call this after the same step."""
        if n_processes() == 1:
            return self.requested
        return bool(summed([torch.tensor([float(self.requested)])])[0])
