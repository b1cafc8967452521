"""States that follow one another, with the action that led to each: what undo and redo walk along."""

from __future__ import annotations

from typing import Generic, TypeVar

from lcc_lens.core.errors import RequestError

State = TypeVar("State")


class Timeline(Generic[State]):
    """A present state, those before it, and those that were undone. States must never be changed in place.

    Args:
        state: the first one.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self._done: list[tuple[State, str]] = []
        self._undone: list[tuple[State, str]] = []

    @property
    def actions(self) -> tuple[str, ...]:
        """The actions that led from the first state to the present one."""
        return tuple(action for _, action in self._done)

    @property
    def undone(self) -> tuple[str, ...]:
        """The actions that were undone, in the order in which redoing does them again."""
        return tuple(action for _, action in reversed(self._undone))

    def note(self, state: State, action: str) -> None:
        """Go on to a new state; what was undone is forgotten."""
        self._done.append((self.state, action))
        self._undone.clear()
        self.state = state

    def undo(self) -> None:
        """Go back to before the last action.

        Raises:
            RequestError: there is none.
        """
        if not self._done:
            raise RequestError("wanted an action to undo, got none; this is where the session began")
        before, action = self._done.pop()
        self._undone.append((self.state, action))
        self.state = before

    def redo(self) -> None:
        """Go forward again by one undone action.

        Raises:
            RequestError: nothing was undone, or something else was done since.
        """
        if not self._undone:
            raise RequestError("wanted an undone action to redo, got none; nothing was undone since the last action")
        after, action = self._undone.pop()
        self._done.append((self.state, action))
        self.state = after
