"""Training logs outside the run directory: trackio, or any object that logs numbers by step."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lcc_lens.core.errors import RequestError
from lcc_lens.core.machine.processes import is_first_process
from lcc_lens.core.metrics import share_recovered
from lcc_lens.restoration.training.config import Step

PROJECT = "lcc_lens"


@runtime_checkable
class Tracker(Protocol):
    """What takes a training's numbers: a run of trackio or of Weights & Biases, or an object of your own.

    Example:
        >>> class Printer:
        ...     def log(self, metrics, step=None):
        ...         print(step, metrics["loss"])
    """

    def log(self, metrics: dict[str, Any], step: int | None = None) -> Any:
        """Take numbers by name: ``loss``, ``lr``, ``response_tokens``, ``seconds`` and, where it was measured,
        ``validation_loss`` of each step; with the last one ``dense_loss``, ``pruned_loss``, ``restored_loss`` in nats
        per response token, and ``share_recovered``."""


#: A tracker, or ``"trackio"``.
Log = Tracker | str


class TrainingLog:
    """Hands the numbers of a training to a tracker; without one, and in other processes than the first, to nobody."""

    def __init__(self, tracker: Tracker | None) -> None:
        self._tracker, self._last = tracker, 0

    def add(self, step: Step) -> None:
        """Log a step."""
        self._last = step.step
        metrics = {"loss": step.loss, "lr": step.lr, "response_tokens": step.n_targets, "seconds": step.seconds}
        self._log(metrics if step.validation_loss is None else {**metrics, "validation_loss": step.validation_loss})

    def finish(self, losses: Mapping[str, float]) -> None:
        """Log the held-out losses of the models."""
        metrics: dict[str, Any] = {f"{name}_loss": loss for name, loss in losses.items()}
        share = share_recovered(losses["dense"], losses["pruned"], losses["restored"])
        self._log(metrics if share is None else {**metrics, "share_recovered": share})

    def _log(self, metrics: dict[str, Any]) -> None:
        if self._tracker is not None:
            self._tracker.log(metrics, step=self._last)


@contextmanager
def training_log(
    log: Log | None, run: Path | None, settings: Mapping[str, Any], *, resume: bool = False
) -> Iterator[TrainingLog]:
    """Open a training's log.

    Args:
        log: see :func:`check_log`; nothing is imported without one.
        run: the run directory, whose name trackio's run gets.
        settings: trackio's configuration of the run.
        resume: go on with trackio's run of that name, if there is one.
    """
    if log is None or not is_first_process():
        yield TrainingLog(None)
    elif isinstance(log, Tracker):
        yield TrainingLog(log)
    else:
        import trackio

        config = json.loads(json.dumps(settings, default=str))
        with redirect_stdout(io.StringIO()):  # it says where its dashboard is
            tracker = trackio.init(
                PROJECT, None if run is None else run.resolve().name, config=config,
                resume="allow" if resume else "never", embed=False,
            )  # fmt: skip
        try:
            yield TrainingLog(tracker)
        finally:
            with redirect_stdout(io.StringIO()):
                tracker.finish()


def check_log(log: Log | None) -> None:
    """Refuse, before any work, what cannot take a training's numbers.

    Args:
        log: an object with ``log(metrics, step=...)``, or ``"trackio"``.

    Raises:
        RequestError: trackio is not installed, or another object.
    """
    if log is None or isinstance(log, Tracker):
        return
    if log != "trackio":
        raise RequestError(f"expected 'trackio' or an object with log(metrics, step=...) as log, got {log!r}; name one")
    if importlib.util.find_spec("trackio") is None:
        raise RequestError("expected the package trackio to log to, got none; pip install trackio, or leave out log")
