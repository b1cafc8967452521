"""What a session has at one moment: the heads, the numbers, and the steps that led there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.core.errors import RequestError
from lcc_lens.core.heads import Head
from lcc_lens.reshaping import with_scaled_constants
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
            raise RequestError("wanted heads to restore, got none; choose some first")
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
