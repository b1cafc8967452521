"""Read-only side of a session: what is chosen, trained, done and undone."""

from __future__ import annotations

import threading

from jaxtyping import Float
from torch import Tensor

from lcc_lens.core.heads import Head
from lcc_lens.frontends.session.state import SessionState, Timeline
from lcc_lens.restoration.training.loop import Step


class SessionView:
    """Properties of a session; any thread may read them at any time."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline, self._lock = timeline, threading.Lock()

    @property
    def _state(self) -> SessionState:
        return self._timeline.state

    @property
    def heads(self) -> tuple[Head, ...]:
        """The chosen heads."""
        return self._state.heads

    @property
    def rank(self) -> int | None:
        """Directions per head; all if None."""
        return self._state.rank

    @property
    def scale(self) -> float:
        """Factor on the constants, in everything that is read and in the export."""
        return self._state.scale

    @property
    def steps(self) -> tuple[Step, ...]:
        """All optimiser steps so far, numbered within their call of :meth:`train`."""
        return self._state.steps

    @property
    def magnitudes(self) -> Float[Tensor, "chosen component"]:
        """Scaled magnitudes of the chosen heads' directions, in units of activations; empty without constants."""
        return self._state.magnitudes()

    @property
    def constants(self) -> Float[Tensor, "chosen d_head"]:
        """Scaled constants added to the chosen heads' outputs; empty without constants."""
        return self._state.constants()

    @property
    def history(self) -> tuple[str, ...]:
        """The actions so far, each as the line of code that repeats it in a new session with the same settings."""
        return self._timeline.actions

    @property
    def undone(self) -> tuple[str, ...]:
        """The undone actions that :meth:`redo` would repeat, the next one first."""
        return self._timeline.undone

    @property
    def is_at_work(self) -> bool:
        """Whether a call is running."""
        return self._lock.locked()
