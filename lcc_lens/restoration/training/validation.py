"""Losses on held-out data, with or without an injection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lcc_lens.core.config import tokens_per_pass
from lcc_lens.core.machine.processes import own_part, summed
from lcc_lens.data.batches import Batch, TokenSequence
from lcc_lens.models.hooked.hooks import HookedModel
from lcc_lens.models.hooked.offloading import device_of
from lcc_lens.restoration.injections.base import Injection
from lcc_lens.restoration.training.objectives import Objective, Source


def response_nll(model: HookedModel, batch: Batch, hooks: Sequence[Any] = ()) -> Tensor:
    """Summed negative log-likelihood (nats) of a batch's counted tokens; logits only at their positions."""
    return Objective().terms(model, batch, hooks)["response"]


def validation_loss(
    model: HookedModel | Source,
    injection: Injection | None,
    sequences: Sequence[TokenSequence],
    micro_tokens: int | None = None,
    objective: Objective | None = None,
    teacher: HookedModel | Source | None = None,
) -> float:
    """The objective per counted token (by default the response loss), of the unrestored model without an injection."""
    objective = objective or Objective()
    terms = validation_terms(model, injection, sequences, micro_tokens, objective, teacher)
    return sum(objective.weights[name] * value for name, value in terms.items())


def validation_terms(
    model: HookedModel | Source,
    injection: Injection | None,
    sequences: Sequence[TokenSequence],
    micro_tokens: int | None,
    objective: Objective,
    teacher: HookedModel | Source | None = None,
) -> dict[str, float]:
    """Every loss of an objective by its name, not weighted, per counted token, all from the same passes.

    Several processes (see :mod:`lcc_lens.core.machine.processes`) divide the sequences and all get the whole.
    """
    counts = objective.counts(sequences)
    totals = dict.fromkeys(counts, 0.0)
    with torch.inference_mode(), (injection or Injection()).attached(hooked_of(model)):
        hooks = injection.hooks() if injection is not None else []
        max_tokens = micro_tokens or tokens_per_pass(device_of(hooked_of(model)))
        for batch in objective.batches(own_part(sequences), max_tokens):
            for name, term in objective.terms(model, batch, hooks, teacher).items():
                totals[name] += float(term)
    (whole,) = summed([torch.tensor(list(totals.values()), dtype=torch.float64)])
    return {name: total / counts[name] for name, total in zip(totals, whole.tolist(), strict=True)}


def hooked_of(model: HookedModel | Source) -> HookedModel:
    """The hooked model behind a source; a model itself."""
    return model.model if isinstance(model, Source) else model
