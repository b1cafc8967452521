"""State of a session, and its undo and redo history."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.injections.changes import Change, LowRank
from lcc_lens.restoration.injections.constants import LccInjection
from lcc_lens.restoration.injections.weights import WeightInjection
from lcc_lens.restoration.training.config import Step


@dataclass(frozen=True)
class SessionState:
    """Everything that undo restores.

    ``injection`` (None before heads are chosen) is never changed in place. ``scale`` multiplies its constants wherever
    they are read or exported. ``held_out`` is the objective on the held-out data, None where it was not measured.
    """

    method: str
    heads: tuple[Head, ...] = ()
    rank: int | None = None
    scale: float = 1.0
    injection: Injection | None = None
    steps: tuple[Step, ...] = ()
    held_out: float | None = None

    def trained(self) -> Injection:
        """The injection as it was trained, without the scale."""
        if self.injection is None:
            raise RequestError("expected heads to restore, got none; choose some first")
        return self.injection

    def scaled(self) -> Injection | None:
        """The injection with its constants scaled; None before heads are chosen."""
        if self.injection is None or self.scale == 1.0:
            return self.injection
        return _with_scaled_constants(self.injection, self.scale)

    def acting(self) -> Injection | None:
        """The injection as :meth:`scaled` gives it; None where it is known to leave the pruned model as it is."""
        injection = self.scaled()
        return None if injection is None or is_identity(injection) else injection

    def magnitudes(self) -> Float[Tensor, "chosen component"]:
        """Scaled magnitudes of the chosen heads' directions, in units of activations; empty without constants."""
        lcc = self._scaled_lcc()
        return torch.zeros(0, 0) if lcc is None else (lcc.unit * lcc.magnitudes).detach().cpu()

    def constants(self) -> Float[Tensor, "chosen d_head"]:
        """Scaled constants added to the chosen heads' outputs; empty without constants."""
        lcc = self._scaled_lcc()
        return torch.zeros(0, 0) if lcc is None else lcc.constants().detach().cpu()

    def _scaled_lcc(self) -> LccInjection | None:
        """The scaled constants only: other parts of the injection may be large, so they are not copied."""
        parts = () if self.injection is None else self.injection.parts
        lcc = next((part for part in parts if isinstance(part, LccInjection)), None)
        return None if lcc is None else _with_scaled_constants(lcc, self.scale)


class Timeline:
    """Undo and redo history of a session: the current state, the states before it, and the undone ones.

    Args:
        state: the first state.
    """

    def __init__(self, state: SessionState) -> None:
        self.state = state
        self._done: list[tuple[SessionState, str]] = []
        self._undone: list[tuple[SessionState, str]] = []

    @property
    def actions(self) -> tuple[str, ...]:
        """The actions that led from the first state to the current one."""
        return tuple(action for _, action in self._done)

    @property
    def undone(self) -> tuple[str, ...]:
        """The undone actions, in the order in which :meth:`redo` repeats them."""
        return tuple(action for _, action in reversed(self._undone))

    def record(self, state: SessionState, action: str) -> None:
        """Make a state the current one; undone actions are forgotten."""
        self._done.append((self.state, action))
        self._undone.clear()
        self.state = state

    def undo(self) -> None:
        """Return to the state before the last action."""
        if not self._done:
            raise RequestError("expected an action to undo, got none; this is where the session began")
        self._move(self._done, self._undone)

    def redo(self) -> None:
        """Repeat the last undone action."""
        if not self._undone:
            raise RequestError("expected an undone action to redo, got none; nothing was undone since the last action")
        self._move(self._undone, self._done)

    def _move(self, source: list[tuple[SessionState, str]], target: list[tuple[SessionState, str]]) -> None:
        state, action = source.pop()
        target.append((self.state, action))
        self.state = state


@torch.no_grad()
def is_identity(injection: Injection) -> bool:
    """Whether all parts are known to change nothing: constants of zero, changes of weights that are zero."""
    for part in injection.parts:
        if isinstance(part, LccInjection):
            zero = not bool(part.constants().any())
        elif isinstance(part, WeightInjection):
            zero = not any(bool(_size(change).any()) for change in part.changes().values())
        else:
            zero = False
        if not zero:
            return False
    return True


def _size(change: Change) -> Tensor:
    """A tensor that is zero where a change leaves its weight as it is."""
    if isinstance(change, LowRank):
        return change.B
    return next(change.parameters())


@torch.no_grad()
def copy_parameters(source: Injection, target: Injection) -> None:
    """Copy trained parameters into an injection of the same method with other heads or another rank, in place.

    A head that both have keeps its offset and the magnitudes of the directions that both have. Parts whose shapes do
    not depend on the heads keep everything.
    """
    for old, new in zip(source.parts, target.parts, strict=True):
        if isinstance(old, LccInjection) and isinstance(new, LccInjection):
            _copy_constants(old, new)
            continue
        kept = old.state_dict()
        if {name: value.shape for name, value in kept.items()} == {n: v.shape for n, v in new.state_dict().items()}:
            new.load_state_dict(kept)


def _copy_constants(source: LccInjection, target: LccInjection) -> None:
    rows = {head: row for row, head in enumerate(source.heads)}
    rank = min(source.magnitudes.shape[1], target.magnitudes.shape[1])
    for row, head in enumerate(target.heads):
        if head in rows:
            target.magnitudes[row, :rank] = source.magnitudes[rows[head], :rank]
            target.offset[row] = source.offset[rows[head]]


AnyInjection = TypeVar("AnyInjection", bound=Injection)


@torch.no_grad()
def _with_scaled_constants(injection: AnyInjection, factor: float) -> AnyInjection:
    """A copy with its constants multiplied by a factor; other parts are unchanged."""
    scaled = copy.deepcopy(injection)
    for part in scaled.parts:
        if isinstance(part, LccInjection):
            part.magnitudes.mul_(factor)
            part.offset.mul_(factor)
    return scaled
