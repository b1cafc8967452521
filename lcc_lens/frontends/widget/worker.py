"""A thread beside the notebook's, in which models run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from lcc_lens.core.errors import LensError, RequestError
from lcc_lens.frontends.session.stopping import Stopped

Job = tuple[str, Callable[[], None]]


class Worker:
    """Runs one list of jobs at a time.

    Args:
        on_state: called with the name of a job when it starts, and with "" when all have ended; from the worker's
            thread.
        on_error: called with an error as one line; an error ends the list, and so does a job that was stopped.
    """

    def __init__(self, on_state: Callable[[str], None], on_error: Callable[[str], None]) -> None:
        self._on_state, self._on_error = on_state, on_error
        self._thread: threading.Thread | None = None
        # Start and end are reported one at a time; the callback of an end may start new jobs, hence re-entrant.
        self._turn = threading.RLock()
        self.is_busy = False

    def begin(self, jobs: Sequence[Job]) -> None:
        """Start jobs, each a name and a function.

        Raises:
            RequestError: earlier jobs are still running.
        """
        with self._turn:
            if self.is_busy:
                raise RequestError("expected an idle widget, got one that is running; wait until it ends, or stop it")
            self.is_busy = True
            self._on_state(jobs[0][0])
            self._thread = threading.Thread(target=self._run, args=(jobs,), name="lcc_lens widget", daemon=True)
            self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all jobs have ended, at most so many seconds; returns whether they have."""
        if self._thread is not None:
            self._thread.join(timeout)
        return not self.is_busy

    def _run(self, jobs: Sequence[Job]) -> None:
        try:
            for name, job in jobs:
                self._on_state(name)
                job()
        except Stopped:
            pass
        except Exception as error:
            self._on_error(error_line(error))
        finally:
            with self._turn:
                self.is_busy = False
                self._on_state("")


def error_line(error: Exception) -> str:
    """An error as one line; an unexpected one with its type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, LensError) else f"{type(error).__name__}: {text}"[:300]
