"""One thread beside the notebook's own, for what runs a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from lcc_lens.core.errors import LensError, RequestError

Job = tuple[str, Callable[[], None]]


class Worker:
    """Does one list of jobs at a time.

    Args:
        tell: called with what a job does as it begins, and with "" when all are done; from the worker's thread.
        fail: called with the one line of an error, which ends the list.
    """

    def __init__(self, tell: Callable[[str], None], fail: Callable[[str], None]) -> None:
        self._tell, self._fail = tell, fail
        self._thread: threading.Thread | None = None
        # Begin and end are told whole, one after the other; who hears of an end may begin anew at once.
        self._turn = threading.RLock()
        self.is_at_work = False

    def begin(self, jobs: Sequence[Job]) -> None:
        """Begin jobs, each with what it does in a word.

        Raises:
            RequestError: others are not done yet.
        """
        with self._turn:
            if self.is_at_work:
                raise RequestError("expected a widget at rest, got one at work; wait until it is done, or stop it")
            self.is_at_work = True
            self._tell(jobs[0][0])
            self._thread = threading.Thread(target=self._run, args=(jobs,), name="lcc_lens widget", daemon=True)
            self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all is done, so many seconds at most; whether it is."""
        if self._thread is not None:
            self._thread.join(timeout)
        return not self.is_at_work

    def _run(self, jobs: Sequence[Job]) -> None:
        try:
            for word, job in jobs:
                self._tell(word)
                job()
        except Exception as error:
            self._fail(line_of(error))
        finally:
            with self._turn:
                self.is_at_work = False
                self._tell("")


def line_of(error: Exception) -> str:
    """An error as one line; one that nobody expected says its kind, too."""
    text = " ".join(str(error).split())
    return text if isinstance(error, LensError) else f"{type(error).__name__}: {text}"[:300]
