"""What a session has at one moment: the heads, the numbers, and the steps that led there."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.injections.constants import LccInjection
from lcc_lens.restoration.training.config import Step


@dataclass(frozen=True)
class SessionState:
    """All that undoing brings back.

    ``injection`` (None before heads are chosen) is never changed; ``scale`` multiplies its constants in all read-outs;
    ``held_out`` is its objective on the held-out data where that is known.
    """

    heads: tuple[Head, ...] = ()
    rank: int | None = None
    scale: float = 1.0
    injection: Injection | None = None
    steps: tuple[Step, ...] = ()
    held_out: float | None = None

    def chosen(self) -> Injection:
        """The injection as it was trained.

        Raises:
            RequestError: no heads are chosen yet.
        """
        if self.injection is None:
            raise RequestError("expected heads to restore, got none; choose some first")
        return self.injection

    def scaled(self) -> Injection | None:
        """The injection with its constants scaled; None before heads are chosen."""
        if self.injection is None or self.scale == 1.0:
            return self.injection
        return with_scaled_constants(self.injection, self.scale)

    def magnitudes(self) -> Float[Tensor, "chosen component"]:
        """Scaled magnitudes of the chosen heads' directions, in units of activations; empty without constants."""
        constant = self._constant()
        return torch.zeros(0, 0) if constant is None else (constant.unit * constant.magnitudes).detach().cpu()

    def constants(self) -> Float[Tensor, "chosen d_head"]:
        """What is added to the chosen heads' outputs; empty without constants."""
        constant = self._constant()
        return torch.zeros(0, 0) if constant is None else constant.constants().detach().cpu()

    def _constant(self) -> LccInjection | None:
        """The scaled constants alone; other parts may be large."""
        parts = () if self.injection is None else self.injection.parts
        constant = next((part for part in parts if isinstance(part, LccInjection)), None)
        return None if constant is None else with_scaled_constants(constant, self.scale)


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
            raise RequestError("expected an action to undo, got none; this is where the session began")
        before, action = self._done.pop()
        self._undone.append((self.state, action))
        self.state = before

    def redo(self) -> None:
        """Go forward again by one undone action.

        Raises:
            RequestError: nothing was undone, or something else was done since.
        """
        if not self._undone:
            raise RequestError("expected an undone action to redo, got none; nothing was undone since the last action")
        after, action = self._undone.pop()
        self._done.append((self.state, action))
        self.state = after


AnyInjection = TypeVar("AnyInjection", bound=Injection)


@torch.no_grad()
def keep_learned(before: Injection, after: Injection) -> None:
    """Copy what an injection has learned into one of the same method with other heads or another rank, in place.

    A head that stays keeps its offset, and its magnitudes as far as both have the direction; parts that do not depend
    on heads keep everything.
    """
    for old, new in zip(before.parts, after.parts, strict=True):
        if isinstance(old, LccInjection) and isinstance(new, LccInjection):
            _keep_constants(old, new)
            continue
        kept = old.state_dict()
        if {name: value.shape for name, value in kept.items()} == {n: v.shape for n, v in new.state_dict().items()}:
            new.load_state_dict(kept)


def _keep_constants(old: LccInjection, new: LccInjection) -> None:
    rows = {head: row for row, head in enumerate(old.heads)}
    n_kept = min(old.magnitudes.shape[1], new.magnitudes.shape[1])
    for row, head in enumerate(new.heads):
        if head in rows:
            new.magnitudes[row, :n_kept] = old.magnitudes[rows[head], :n_kept]
            new.offset[row] = old.offset[rows[head]]


@torch.no_grad()
def with_scaled_constants(injection: AnyInjection, factor: float) -> AnyInjection:
    """A copy whose constants are multiplied by a number; other parts are as they were."""
    scaled = copy.deepcopy(injection)
    for part in scaled.parts:
        if isinstance(part, LccInjection):
            part.magnitudes.mul_(factor)
            part.offset.mul_(factor)
    return scaled
