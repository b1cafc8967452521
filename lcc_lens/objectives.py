"""What training minimises: the response's loss, the distance to the dense model, or a weighted sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lcc_lens.data import Batch
from lcc_lens.errors import RequestError
from lcc_lens.hooks import HookedModel, logits_at
from lcc_lens.metrics import token_divergence, token_nll
from lcc_lens.models import device_of
from lcc_lens.running import forward

_NAMES = ("response", "distillation")


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses, each in nats per counted token.

    Args:
        response: weight of the response's cross-entropy (the paper's objective).
        distillation: weight of the Kullback-Leibler divergence from the dense model's next-token distribution.
        temperature: of that divergence; both distributions are flattened by it, and the result is multiplied by its
            square, so that gradients keep their size (Hinton et al., arXiv 1503.02531).
    """

    response: float = 1.0
    distillation: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        weights = self.response, self.distillation
        if not (all(weight >= 0 and math.isfinite(weight) for weight in weights) and sum(weights) > 0):
            raise RequestError(f"wanted weights of the objective of at least 0, one above, got {weights}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise RequestError(f"wanted a temperature above 0, got {self.temperature}")

    @classmethod
    def parse(cls, text: str, *, temperature: float = 1.0) -> Objective:
        """Read ``response``, ``distillation``, or both joined by ``+`` with equal weights.

        Raises:
            RequestError: another name.
        """
        names = text.split("+")
        wrong = [name for name in names if name not in _NAMES]
        if wrong or len(set(names)) < len(names):
            raise RequestError(f"wanted an objective ({', '.join(_NAMES)}, or both joined by +), got {text!r}")
        weights = {name: 1 / len(names) for name in names}
        return cls(weights.get("response", 0.0), weights.get("distillation", 0.0), temperature)

    @property
    def needs_teacher(self) -> bool:
        """Whether the dense model must run along."""
        return self.distillation > 0

    def loss(
        self, model: HookedModel, batch: Batch, hooks: Sequence[Any] = (), teacher: HookedModel | None = None
    ) -> Tensor:
        """The objective summed over a batch's counted tokens; logits are computed only at their positions."""
        terms = self.terms(model, batch, hooks, teacher)
        return torch.stack([getattr(self, name) * term for name, term in terms.items()]).sum()

    def terms(
        self, model: HookedModel, batch: Batch, hooks: Sequence[Any] = (), teacher: HookedModel | None = None
    ) -> dict[str, Tensor]:
        """The losses that have a weight, each summed over a batch's counted tokens and not weighted, from one pass.

        Raises:
            RequestError: no dense model for distillation.
        """
        mask = batch.is_target().to(device_of(model))
        logits = _logits(model, batch, mask, hooks)
        terms = {}
        if self.response:
            terms["response"] = token_nll(logits, batch.targets().to(logits.device)).sum()
        if self.distillation:
            if teacher is None:
                raise RequestError("wanted the dense model for distillation, got none")
            with torch.no_grad():
                wanted = _logits(teacher, batch, mask.to(device_of(teacher)), ())
            terms["distillation"] = token_divergence(wanted.to(logits.device), logits, self.temperature).sum()
        return terms


def _logits(model: HookedModel, batch: Batch, mask: Tensor, hooks: Sequence[Any]) -> Float[Tensor, "token vocab"]:
    logits: Tensor = forward(model, batch.tokens.to(mask.device), [*hooks, *logits_at(model, mask)])
    return logits[0]
