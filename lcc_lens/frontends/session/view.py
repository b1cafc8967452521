"""Read-only side of a session: what is chosen, trained, done and undone."""

from __future__ import annotations

import threading
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lcc_lens.core.heads import HeadTuple
from lcc_lens.core.showing import Shown
from lcc_lens.frontends.session.state import SessionState, Timeline
from lcc_lens.restoration.training.config import Steps


class SessionView(Shown):
    """Properties of a session; any thread may read them at any time."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline, self._lock = timeline, threading.Lock()

    def _facts(self) -> dict[str, Any]:
        held_out = self._state.held_out
        return {
            "method": self.method, "heads": self.heads,
            "rank": "all" if self.rank is None else self.rank, "scale": self.scale,
            "steps": len(self.steps), "held-out objective": "not measured" if held_out is None else held_out,
            "last actions": "; ".join(self.history[-3:]) or "none", "undone": len(self.undone),
        }  # fmt: skip

    @property
    def _state(self) -> SessionState:
        return self._timeline.state

    @property
    def method(self) -> str:
        """How it restores."""
        return self._state.method

    @property
    def heads(self) -> HeadTuple:
        """The chosen heads."""
        return HeadTuple(self._state.heads)

    @property
    def rank(self) -> int | None:
        """Directions per head; all if None."""
        return self._state.rank

    @property
    def scale(self) -> float:
        """Factor on the constants, in everything that is read and in the export."""
        return self._state.scale

    @property
    def steps(self) -> Steps:
        """All optimiser steps so far, numbered within their call of :meth:`train`."""
        return Steps(self._state.steps)

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
